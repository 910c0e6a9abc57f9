"""The thread that owns an `LLMEngine`: it carries out orders, runs steps and publishes what requests have grown by."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from specontext.engine.generation import Generation
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.orders import Life, Observer, Order
from specontext.engine.request_stream import Progress, RequestStream
from specontext.engine.status import StatusMeter
from specontext.errors import EngineDeadError, NamedRequestsError, RequestFailedError, SpeContextError, described

logger = logging.getLogger("specontext")

_LOAD_PERIOD = 0.5  # seconds between two loads of a working engine


@dataclass(eq=False, slots=True)
class _Output:
    """One output of a stream: the engine's generation and how much of it has been counted."""

    stream: RequestStream
    index: int
    generation: Generation
    last_at: float
    made: int = 0


class EngineLoop:
    """Runs an engine in a thread of its own until it is closed or breaks.

    Args:
        post: hands a callback over to the readers' event loop; must not block.
        on_death: called on this thread when an error has ended the loop.

    Attributes:
        error: what ended the loop.
        open_outputs: outputs that are waiting or running; `order` adds to it, this thread takes away.
    """

    def __init__(
        self,
        engine: LLMEngine,
        *,
        post: Callable[[Callable[[], None]], None],
        observer: Observer | None,
        on_idle: Callable[[], None],
        on_death: Callable[[], None],
    ) -> None:
        self.engine, self.meter = engine, StatusMeter()
        self.error: Exception | None = None
        self.open_outputs = 0
        self.lock = threading.Lock()  # guards the three attributes that both sides write: error, open_outputs, _woken
        self._post, self._observer, self._on_idle, self._on_death = post, observer, on_idle, on_death
        self._inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._outputs: dict[str, _Output] = {}
        self._unseen: list[Generation] = []
        self._unshowable: dict[str, Exception] = {}
        self._overlaps = engine.device.type != "cpu"  # a GPU computes while the host goes on
        self._woken: set[RequestStream] = set()
        self._thread = threading.Thread(target=self._run, name="specontext-engine", daemon=True)

    def start(self) -> None:
        self.meter.take(self.engine)
        self.engine.when_lost(lambda: self.order(Order(self.engine.raise_if_lost)))
        self._thread.start()

    def order(self, order: Order | None) -> None:
        """Have something done by the loop; None ends it. With `lock` held, a loop that has not ended will see the order."""
        self._inbox.put(order)

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    # ---- all below runs on the loop's thread

    def _run(self) -> None:
        try:
            self.engine.settle()
            while self._take_orders():
                if self.engine.has_work:
                    self._step()
                idle = not self.engine.has_work
                if idle or time.perf_counter() - self.meter.latest.taken_at > _LOAD_PERIOD:
                    self.meter.take(self.engine)
                if idle and self.engine.config.verify_loads:
                    self.engine.check_integrity()
            self._end(EngineDeadError("the engine was closed"))
        except BaseException as error:  # whatever it was, nobody else would notice
            logger.exception("the engine's loop has died")
            self._end(EngineDeadError(f"the engine has died: {described(error)}"))
            self._on_death()

    def _take_orders(self) -> bool:
        """Carry out what was ordered, waiting for an order when there is nothing else to do; whether to go on."""
        wait = not self.engine.has_work
        while True:
            try:
                order = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if order is None:
                return False
            order.run()
            wait = False

    def add(self, stream: RequestStream) -> None:
        """Queue all outputs of a stream, or none.

        Raises:
            SpeContextError: the engine cannot serve it.
        """
        try:
            prompts = self.engine.intake.check_all(stream.prompts, [stream.params] * len(stream.prompts))
            for index in range(stream.count):
                prompt, which = divmod(index, stream.params.n)
                name = stream.output_id(index)
                generation = self.engine.add_request(name, prompts[prompt], stream.params, index=which, checked=True)
                self._outputs[name] = _Output(stream, index, generation, stream.arrived)
        except Exception as error:
            added = self.drop(stream, "error")
            self._gone(stream.count - added)
            if isinstance(error, SpeContextError):
                raise
            logger.exception("request %s could not be added", stream.request_id)
            raise RequestFailedError({stream.request_id: error}) from error

    def drop(self, stream: RequestStream, reason: str) -> int:
        """Abort what is left of a stream; how many outputs that were."""
        names = [stream.output_id(index) for index in range(stream.count)]
        left = [name for name in names if (output := self._outputs.get(name)) is not None and output.stream is stream]
        for name in left:
            self.engine.abort(name)
        # Who sees that nothing is open any more finds it in the numbers; an engine that fails may have none to give.
        if left and reason != "error" and not self.engine.has_work:
            self.meter.take(self.engine)
        for name in left:
            self._forget(name, reason)
        return len(left)

    def fail(self, stream: RequestStream, error: Exception) -> None:
        """End a stream with an error that its reader sees."""
        stream.failure = error
        self.drop(stream, "error")
        self._wake({stream})

    def fail_all(self, error: Exception) -> None:
        for stream in {output.stream for output in self._outputs.values()}:
            self.fail(stream, error)

    def _step(self) -> None:
        """Run a step. On a GPU what it gives is shown while the next one computes, if there is a next one."""
        try:
            touched = self.engine.step(self._show)
            if self._observer is not None and self.engine.step_tokens:
                self._observer.step(self.engine.step_tokens)
        except Exception as error:
            if not self._fail_named(error):
                raise
            touched = [output.generation for output in self._outputs.values()]  # the others went on, and may have ended
        self._show()  # where the step did not call it
        self._unseen = touched
        if not self._overlaps or not self.engine.has_work:
            self._show()
        if self._unshowable:  # not before the step is over: it may have been theirs too
            broken, self._unshowable = self._unshowable, {}
            self._fail_named(RequestFailedError(broken))

    def _show(self) -> None:
        """Publish what the last step gave."""
        unseen, self._unseen = self._unseen, []
        woken = set()
        for generation in unseen:
            output = self._outputs.get(generation.request.request_id)
            if output is None:
                continue
            try:
                if self._publish(output):
                    woken.add(output.stream)
            except Exception as error:  # in its text, which is decoded here
                self._unshowable[generation.request.request_id] = error
        if woken and not self.engine.has_work:  # who has the last answer finds it in the numbers
            self.meter.take(self.engine)
        self._wake(woken)

    def _fail_named(self, error: Exception) -> bool:
        """Fail the requests that an error of a step names; False when it names none."""
        named = error.reasons if isinstance(error, NamedRequestsError) else {}
        broken = {self._outputs[name].stream: why for name, why in named.items() if name in self._outputs}
        for stream, why in broken.items():
            expected = isinstance(why, SpeContextError)
            logger.error("request %s has failed: %s", stream.request_id, why, exc_info=None if expected else why)
            traceback.clear_frames(why.__traceback__)  # the reader gets the error, and not the tensors of the step with it
            self.fail(stream, RequestFailedError({stream.request_id: why}))
        return bool(named)

    def _publish(self, output: _Output) -> bool:
        """Show how far an output has come and count its new tokens; whether its reader is to be woken."""
        stream, generation, request = output.stream, output.generation, output.generation.request
        made = len(request.token_ids) - request.prompt_length
        pieces = generation.detokenizer.pieces  # decoded now even if nobody waits for it: all at once it would hold others up
        if generation.finished or not stream.only_final:
            thinking = generation.detokenizer.thinking
            stream.progress[output.index] = Progress(
                pieces=pieces,
                num_pieces=len(pieces),
                token_ids=request.token_ids,
                begin=request.prompt_length,
                end=len(request.token_ids),
                logprobs=request.logprobs,
                prompt_logprobs=request.prompt_logprobs if made else None,
                finish_reason=request.finish_reason,
                stats=generation.stats,
                thoughts=thinking.pieces if thinking is not None else [],
                num_thoughts=len(thinking.pieces) if thinking is not None else 0,
                reasoning_tokens=thinking.tokens if thinking is not None else 0,
                stop=generation.detokenizer.stop,
            )
        if made > output.made:
            now = generation.last_token_at or time.perf_counter()
            self.meter.generation_tokens += made - output.made
            if (prompt := output.index // stream.params.n) not in stream.begun:  # once, as in its usage
                stream.begun.add(prompt)
                self.meter.prompt_tokens += request.prompt_length
            if self._observer is not None:
                self._observer.token(now - output.last_at, first=not output.made)
            output.last_at, output.made = now, made
        if generation.finished:
            if generation.stats is not None:
                self.meter.ended(generation.stats)
            self._forget(request.request_id, request.finish_reason or "stop")
        return not stream.only_final or stream.complete

    def _forget(self, name: str, reason: str) -> None:
        output, now = self._outputs.pop(name), time.perf_counter()
        if self._observer is not None:
            self._observer.ended(_life(output, reason, now))
        self._gone(1)

    def _gone(self, count: int) -> None:
        with self.lock:
            self.open_outputs -= count
            idle = not self.open_outputs
        if idle:
            self._post(self._on_idle)

    def _wake(self, streams: set[RequestStream]) -> None:
        if not streams:
            return
        with self.lock:
            first = not self._woken
            self._woken |= streams
        if first:  # one message however many streams, and none while one is on its way
            self._post(self._deliver)

    def _deliver(self) -> None:
        """Wake the readers; runs on their event loop."""
        with self.lock:
            woken, self._woken = self._woken, set()
        for stream in woken:
            stream.ready.set()

    def _end(self, error: EngineDeadError) -> None:
        """Fail everything that is open and every order that has not been carried out."""
        with self.lock:
            self.error = error
            self.open_outputs = 0
        streams = {output.stream for output in self._outputs.values()}
        for stream in streams:
            stream.failure = error
        self._outputs.clear()
        self._wake(streams)
        self._post(self._on_idle)
        with contextlib.suppress(queue.Empty):
            while True:
                order = self._inbox.get(block=False)
                if order is not None:
                    order.refuse(error)


def _life(output: _Output, reason: str, now: float) -> Life:
    """What there is to say about an output that ends now."""
    generation, request, arrived = output.generation, output.generation.request, output.stream.arrived
    seated, first, last = request.admitted_at, generation.first_token_at, generation.last_token_at
    return Life(
        reason,
        seconds=now - arrived,
        queued=(now if seated is None else seated) - arrived,
        prefill=first - seated if first is not None and seated is not None else None,
        decode=last - first if last is not None and first is not None else None,
        prompt_tokens=request.prompt_length,
        tokens=len(request.token_ids) - request.prompt_length,
    )
