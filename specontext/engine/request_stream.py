"""The asyncio end of one request: what its outputs have grown by since the reader last looked.

The engine's thread publishes how far each output has come; it never waits for a reader. A reader takes everything that is new in
one piece, so a slow one gets fewer and longer pieces, and what is held for it is bounded by the outputs themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from specontext.engine.output_statistics import OutputStatistics
from specontext.sampling_params import SamplingParams


@dataclass(frozen=True)
class Progress:
    """How far one output has come; the lists belong to the engine, which only appends to them.

    Attributes:
        pieces: text that may be shown, the first `num_pieces` of them.
        thoughts, num_thoughts, reasoning_tokens: the same of the thinking before it, where it is told apart, and its tokens with
            their marks.
        stop: the stop string that ended the output.
        begin, end: the output's tokens are `token_ids[begin:end]`.
        prompt_logprobs: complete; None before the first token.
    """

    pieces: list[str]
    num_pieces: int
    token_ids: list[int]
    begin: int
    end: int
    logprobs: list[dict[int, float]] | None
    prompt_logprobs: list[dict[int, float] | None] | None
    finish_reason: str | None
    stats: OutputStatistics | None
    thoughts: Sequence[str] = ()
    num_thoughts: int = 0
    reasoning_tokens: int = 0
    stop: str | None = None


@dataclass(frozen=True)
class Delta:
    """What one output has grown by.

    Attributes:
        index: number of the output: prompt number * n + which of the prompt's outputs.
        prompt_logprobs: of all prompt tokens, in the delta of the output's first token, if they were asked for.
        finish_reason: set in the output's last delta.
        stats: statistics of the output, in its last delta.
        reasoning: new text of the thinking, where it is told from the answer.
        reasoning_tokens: tokens of all the thinking so far.
        stop: the stop string that ended the output, in its last delta.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    prompt_logprobs: list[dict[int, float] | None] | None
    finish_reason: str | None
    stats: OutputStatistics | None
    reasoning: str = ""
    reasoning_tokens: int = 0
    stop: str | None = None


class RequestStream:
    """An asynchronous iterator over lists of deltas, made by `AsyncEngine.submit`.

    Raises while iterating:
        SpeContextError: the request, or the engine, has failed; deltas that were made before come first.
    """

    def __init__(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        only_final: bool,
        abort: Callable[[RequestStream], None],
    ) -> None:
        self.request_id, self.prompts, self.params, self.only_final = request_id, prompts, params, only_final
        self.arrived = time.perf_counter()
        self.count = len(prompts) * params.n
        self.progress: list[Progress | None] = [None] * self.count  # written by the engine's thread
        self.failure: Exception | None = None  # written by the engine's thread
        self.begun: set[int] = set()  # prompts of which an output has a token; the engine's thread's
        self.ready = asyncio.Event()
        self._abort = abort
        self._shown: list[Progress | None] = [None] * self.count

    def output_id(self, index: int) -> str:
        """The engine's name for one of the outputs."""
        return f"{self.request_id}-{index}"

    @property
    def complete(self) -> bool:
        """Whether all outputs have ended by themselves."""
        return all(progress is not None and progress.finish_reason for progress in self.progress)

    def abort(self) -> None:
        """End the request, whatever its state; needed once the stream is no longer read, harmless when it has ended."""
        if not self.complete and self.failure is None:
            self._abort(self)

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self

    async def __anext__(self) -> list[Delta]:
        while True:
            self.ready.clear()
            failure = self.failure  # read first: what was published before the failure is shown before it
            if deltas := self._take():
                return deltas
            if failure is not None:
                raise failure
            if all(shown is not None and shown.finish_reason for shown in self._shown):
                raise StopAsyncIteration
            await self.ready.wait()

    def _take(self) -> list[Delta]:
        deltas = []
        for index, new in enumerate(self.progress):
            old = self._shown[index]
            if new is not None and new is not old:
                self._shown[index] = new
                deltas.append(_difference(index, old, new))
        return deltas


def _difference(index: int, old: Progress | None, new: Progress) -> Delta:
    shown_pieces = old.num_pieces if old is not None else 0
    shown_end = old.end if old is not None else new.begin
    logprobs = new.logprobs[shown_end - new.begin : new.end - new.begin] if new.logprobs is not None else None
    return Delta(
        index,
        "".join(new.pieces[shown_pieces : new.num_pieces]),
        new.token_ids[shown_end : new.end],
        logprobs,
        new.prompt_logprobs if old is None or old.prompt_logprobs is None else None,
        new.finish_reason,
        new.stats,
        "".join(new.thoughts[old.num_thoughts if old is not None else 0 : new.num_thoughts]),
        new.reasoning_tokens,
        new.stop,
    )
