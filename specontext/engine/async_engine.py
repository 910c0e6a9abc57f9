"""The engine behind asyncio: coroutines submit requests and read what they have grown by; a thread runs the steps.

    coroutine   submit, abort, call ── orders ──> EngineLoop: add, abort, step, publish
                RequestStream <── progress of each output, and one wake-up a step

Nothing but orders and published, immutable progress passes between the two sides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from specontext.engine.engine_loop import EngineLoop
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.orders import Observer, Order
from specontext.engine.request_stream import Delta, RequestStream
from specontext.engine.status import EngineStatus
from specontext.errors import EngineDeadError, QueueFullError, RequestError, RequestFailedError, SpeContextError
from specontext.sampling_params import SamplingParams

__all__ = ["AsyncEngine", "EngineDeadError", "Observer", "QueueFullError", "RequestFailedError"]

Result = TypeVar("Result")


class AsyncEngine:
    """An `LLMEngine` for many coroutines of one event loop.

    Args:
        max_waiting: outputs that may wait for a place in the batch; more are refused.
        on_death: called on the event loop when an error has ended the engine.
    """

    def __init__(
        self,
        engine: LLMEngine,
        *,
        max_waiting: int = 512,
        observer: Observer | None = None,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self.engine, self.max_waiting, self.on_death = engine, max_waiting, on_death
        self._events: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = EngineLoop(
            engine, post=self._post, observer=observer, on_idle=self._note_idle, on_death=lambda: self._post(self._died)
        )

    def start(self) -> None:
        """Start the engine's loop; the running event loop is the one that will submit and read."""
        self._events = asyncio.get_running_loop()
        self._loop.start()

    async def settled(self) -> None:
        """Wait until the engine's thread takes orders.

        Raises:
            EngineDeadError: it has ended instead.
        """
        await self.call(lambda _: None)

    @property
    def error(self) -> Exception | None:
        """What ended the engine."""
        return self._loop.error

    @property
    def is_dead(self) -> bool:
        return self._loop.error is not None

    @property
    def status(self) -> EngineStatus:
        """What the engine is doing; renewed twice a second while it works, and when it has finished."""
        return self._loop.meter.latest

    @property
    def open_outputs(self) -> int:
        """Outputs that are waiting or running."""
        return self._loop.open_outputs

    @property
    def running(self) -> int:
        return 0 if self.engine.closed else len(self.engine.scheduler.running)

    @property
    def waiting(self) -> int:
        return max(0, self._loop.open_outputs - self.running)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts that have been processed, once however many outputs they have."""
        return self._loop.meter.prompt_tokens

    @property
    def generation_tokens(self) -> int:
        """All tokens that have been generated."""
        return self._loop.meter.generation_tokens

    async def submit(
        self, request_id: str, prompts: Sequence[Sequence[int]], params: SamplingParams, *, only_final: bool = False
    ) -> RequestStream:
        """Queue a request, `params.n` outputs for each prompt, and wait until the engine has accepted it.

        The caller must exhaust the stream or call its `abort`.

        Args:
            request_id: must differ from those of all open requests.
            only_final: wake the reader only when all outputs have ended.

        Raises:
            RequestError: the request cannot be served.
            QueueFullError: it might be served later.
            EngineDeadError: the engine has ended.
        """
        stream = RequestStream(request_id, prompts, params, only_final=only_final, abort=self._abort)
        if stream.count > self.max_waiting:
            raise RequestError(f"{stream.count} outputs are more than the queue of {self.max_waiting} can hold: ask for fewer")
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._loop.lock:
            self._raise_if_dead()
            if self.waiting + stream.count > self.max_waiting:
                raise QueueFullError(f"the queue of {self.max_waiting} waiting requests is full: try again later")
            self._loop.open_outputs += stream.count
            self._idle.clear()
            self._order(accepted, lambda: self._loop.add(stream))
        try:
            await accepted
        except asyncio.CancelledError:
            stream.abort()
            raise
        return stream

    async def generate(self, request_id: str, prompt: str | Sequence[int], params: SamplingParams) -> AsyncIterator[list[Delta]]:
        """The deltas of one prompt's outputs; leaving the iteration early ends the request. Raises as `submit`."""
        stream = await self.submit(request_id, [self.engine.intake.encode(prompt)], params)
        try:
            async for deltas in stream:
                yield deltas
        finally:
            stream.abort()

    async def call(self, function: Callable[[LLMEngine], Result]) -> Result:
        """Run a function on the engine's thread, between two steps."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        with self._loop.lock:
            self._raise_if_dead()
            self._order(future, lambda: function(self.engine))
        return await future

    def abort_all(self, reason: SpeContextError) -> None:
        """End every open request with this failure."""
        self._loop.order(Order(lambda: self._loop.fail_all(reason)))

    async def drained(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()

    async def close(self) -> None:
        """End the loop; what still runs fails. The engine is closed too."""
        self._loop.order(None)
        await asyncio.to_thread(self._loop.join)
        self.engine.close()

    def _abort(self, stream: RequestStream) -> None:
        def drop() -> None:
            self._loop.drop(stream, "abort")

        self._loop.order(Order(drop))

    def _raise_if_dead(self) -> None:
        if self._loop.error is not None:
            raise self._loop.error

    def _order(self, future: asyncio.Future[Any], function: Callable[[], object]) -> None:
        """Have a function run by the loop and its result or error put into the future."""

        def refuse(error: Exception) -> None:
            self._post(lambda: None if future.done() else future.set_exception(error))

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                refuse(error)
            else:
                self._post(lambda: None if future.done() else future.set_result(result))

        self._loop.order(Order(run, refuse))

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._events is not None
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody reads any more
            self._events.call_soon_threadsafe(callback)

    def _note_idle(self) -> None:
        if not self._loop.open_outputs:
            self._idle.set()

    def _died(self) -> None:
        if self.on_death is not None:
            self.on_death()
