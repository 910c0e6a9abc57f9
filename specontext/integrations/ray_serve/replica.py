"""One engine in a process of its own, which the server's application answers for."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from starlette.types import Message

from specontext.config import EngineConfig
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.long_lived import keep_for_good
from specontext.engine.parallel_engine import make_engine
from specontext.integrations.ray_serve.call import Call, joined
from specontext.integrations.ray_serve.settings import DeployConfig
from specontext.server.app import create_app
from specontext.server.logs import configure_logging, log_load
from specontext.server.state import ServerState

_DEATH_NOTICE = 1.0  # seconds in which open requests can be told that the engine has died
_LAST_WORDS = 5.0  # seconds that an application may take to end when nobody waits for its answer


class EngineReplica:
    """What Ray Serve starts, asks and ends; keys and origins are checked before a call comes here."""

    async def __init__(self, engine_config: EngineConfig, config: DeployConfig) -> None:  # type: ignore[misc]
        configure_logging()
        self.name: str = serve.get_replica_context().replica_id.unique_id
        engine = await asyncio.to_thread(_loaded, engine_config)
        inner = replace(
            config, api_key=(), allowed_origins=(), allow_credentials=False, allowed_methods=("*",), allowed_headers=("*",)
        )
        self.state = ServerState(engine, inner)
        self.app = create_app(self.state)
        self.state.engine.on_death = self._engine_died
        self.state.engine.start()
        await self.state.engine.settled()
        interval = config.log_interval
        self._log = asyncio.create_task(log_load(self.state.engine, interval)) if interval else None

    async def answer(self, call: Call) -> AsyncIterator[list[Message]]:
        """The messages of the application's answer, as many at a time as there are; ended early, the request is aborted."""
        outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        left, read = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal read
            if read:
                await left.wait()
                return {"type": "http.disconnect"}
            read = True
            return {"type": "http.request", "body": call.body, "more_body": False}

        async def send(message: Message) -> None:
            outbox.put_nowait(message)

        task = asyncio.ensure_future(self.app(dict(call.scope), receive, send))
        task.add_done_callback(lambda _: outbox.put_nowait(None))
        try:
            going = True
            while going:
                found = [await outbox.get()]
                while not outbox.empty():
                    found.append(outbox.get_nowait())
                going = found[-1] is not None
                if messages := joined([message for message in found if message is not None]):
                    yield messages
            await task
        finally:
            left.set()
            if not task.done():
                await asyncio.wait((task,), timeout=_LAST_WORDS)
                task.cancel()

    async def metrics(self) -> tuple[str, list[Metric]]:
        """The replica's name and numbers."""
        return self.name, list(self.state.metrics.registry.collect())

    async def status(self) -> tuple[str, dict[str, Any]]:
        """The replica's name and what its status page would show."""
        scope = {"type": "http", "method": "GET", "path": "/status", "query_string": b"", "headers": []}
        found = [message async for messages in self.answer(Call(scope, b"")) for message in messages]
        return self.name, json.loads(b"".join(message.get("body", b"") for message in found))

    async def holding(self, names: Sequence[str]) -> str | None:
        """The replica's name if it keeps any of these answers or items of answers."""
        kept = self.state.responses
        return self.name if any(kept.items_of(name) is not None or kept.item(name) is not None for name in names) else None

    async def living(self) -> bool:
        return not self.state.engine.is_dead

    def record_autoscaling_stats(self) -> dict[str, float]:
        engine = self.state.engine
        return {
            "running": float(engine.running),
            "waiting": float(engine.waiting),
            "seats": float(engine.engine.config.max_num_seqs),
            "kv": engine.status.device_kv_used,
        }

    def check_health(self) -> None:
        """Raises what ended the engine; Ray then starts another replica."""
        if self.state.engine.error is not None:
            raise self.state.engine.error

    async def __del__(self) -> None:
        """Called by Ray Serve when no request is left, or when they have taken too long."""
        if hasattr(self, "state"):
            if self._log is not None:
                self._log.cancel()
            self.state.engine.on_death = None
            await self.state.engine.close()
            self.state.encoder.close()

    def _engine_died(self) -> None:
        asyncio.get_running_loop().call_later(_DEATH_NOTICE, os._exit, 1)  # a health check would find it only after a while


def _loaded(config: EngineConfig) -> LLMEngine:
    engine = make_engine(config)
    engine.warm_up()
    keep_for_good()
    return engine
