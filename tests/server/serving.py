"""Servers for tests: `nano` in this process on a loopback port, or in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from specontext import SpeContextConfig
from specontext.config import EngineConfig
from specontext.engine.llm_engine import LLMEngine
from specontext.server.run import Serving, listening_socket
from specontext.server.settings import ServerConfig
from tests.forked import ForkedCommand

PATIENCE = 60.0  # seconds after which a condition that should come true counts as never


def wait_for(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Poll until `condition` is true; its value."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        threading.Event().wait(0.01)
    raise AssertionError(f"{what} did not come true within {PATIENCE:g} s")


def make_engine(model: str | Path = "nano", *, offload_layers: int = 2, budget: int = 64, **options: Any) -> LLMEngine:
    """A small engine; two of nano's layers live in host memory, so that all tiers are in use."""
    method = SpeContextConfig(budget=budget, offload_layers=offload_layers, **options.pop("method", {}))
    return LLMEngine(EngineConfig(model, method=method, **({"device": "cpu", "max_model_len": 2048} | options)))


@dataclass
class Server:
    """A server of this process, in a thread of its own."""

    url: str
    serving: Serving
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop
    ended: list[BaseException] = field(default_factory=list)

    @property
    def engine(self) -> LLMEngine:
        return self.serving.state.engine.engine

    @property
    def open_outputs(self) -> int:
        return self.serving.state.engine.open_outputs

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, verify=False, **options)  # certificates take time to load

    @cached_property
    def http(self) -> httpx.Client:
        return self.client()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def check_idle(self) -> None:
        """Wait until nothing runs; then all pages must be free."""
        wait_for(lambda: not self.open_outputs and not self.engine.has_work, "an idle engine")
        check_free(self.engine)

    def stop(self) -> None:
        """As SIGTERM does."""
        self.loop.call_soon_threadsafe(self.serving.stop)


def check_free(engine: LLMEngine) -> None:
    engine.check_integrity()
    assert engine.parts.kv.arena.pages.num_held == 0
    assert engine.parts.kv.host.pages.num_held == 0


@contextmanager
def running(engine: LLMEngine, **options: Any) -> Iterator[Server]:
    """A server over an engine, ready; stopped at the end."""
    config = ServerConfig(**({"port": 0, "log_interval": 0, "shutdown_timeout": 5.0} | options))
    ready = threading.Event()
    found: dict[str, Any] = {}

    def announce(_: LLMEngine, address: str) -> None:
        found["url"] = address
        ready.set()

    async def serve(listener: Any) -> None:
        found["loop"] = asyncio.get_running_loop()
        found["serving"] = Serving(engine, config, listener, announce)
        await found["serving"].run()

    def run() -> None:
        try:
            with listening_socket(config.host, config.port) as listener:
                asyncio.run(serve(listener))
        except BaseException as error:
            found["server"].ended.append(error) if "server" in found else found.setdefault("error", error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE) and "url" in found, found
    server = found["server"] = Server(found["url"], found["serving"], thread, found["loop"])
    try:
        yield server
    finally:
        if thread.is_alive():
            server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"


@dataclass
class Process:
    """`specontext serve` in a process of its own.

    Attributes:
        seconds: until it was ready: of processor time where the system tells, since other programs may keep it waiting.
    """

    popen: subprocess.Popen[str] | ForkedCommand
    url: str
    log: Path
    seconds: float

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.popen.wait(PATIENCE)


@contextmanager
def process(log: Path, *words: str, forked: bool = False) -> Iterator[Process]:
    """A server process, ready.

    Args:
        forked: from a process that has imported everything, for tests that are not about how it starts.
    """
    command = ["serve", "nano", "--port", "0", "--device", "cpu", *words]
    began = time.monotonic()
    popen: subprocess.Popen[str] | ForkedCommand
    with log.open("w") as stderr:
        if forked:
            popen = ForkedCommand(command, stderr.fileno())
        else:
            started = [sys.executable, "-m", "specontext.cli", *command]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            popen = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    try:
        assert popen.stdout is not None
        line = popen.stdout.readline()
        assert line.startswith("ready: "), log.read_text()
        yield Process(popen, line.split(" at ")[1].strip(), log, _processor_seconds(popen.pid) or time.monotonic() - began)
    finally:
        popen.kill()
        popen.wait()


def _processor_seconds(pid: int) -> float | None:
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return None
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
