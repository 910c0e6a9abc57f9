"""What several tests of the engine share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from specontext import LLM
from specontext.engine.chunk_graphs import PROMPTS, Attention, Captured, ChunkGraphs, Cutter, ForwardPass, in_pieces
from specontext.engine.graphs import DecodeGraphs, DecodeStep, _Captured, _Kind, _padding, decode_batch, sizes
from specontext.models.attention import LayerAttention


class AsIfCaptured(DecodeGraphs):
    """Captured steps on a CPU: as on a GPU padded, on numbers of their own, and each writing over what others have returned."""

    def __init__(self, llm: LLM) -> None:
        parts = llm.engine.parts
        super().__init__(seats=parts.kv.num_seats, device=parts.kv.device)
        self.replayed: list[_Kind] = []

    def _capture(self, kind: _Kind, step: DecodeStep) -> _Captured:
        padding = _padding(kind.size, self._seats, self._device)
        numbers = padding.clone()
        batch = decode_batch(numbers, kind.span, kind.choice)
        logits = step(batch)
        if self._logits is None:
            self._logits = logits.new_empty((max(sizes(self._seats)), logits.shape[1]))
        place = self._logits

        class Graph:
            @staticmethod
            def replay() -> None:
                self.replayed.append(kind)
                place.fill_(torch.nan)
                place[: kind.size] = step(batch)

        return _Captured(Graph(), numbers, padding, batch, place)  # type: ignore[arg-type]


class ChunksAsIfCaptured(ChunkGraphs):
    """The same for chunks in pieces: on places that all layers share, which hold what others have left there."""

    def __init__(self, llm: LLM) -> None:
        parts = llm.engine.parts
        super().__init__(min(parts.step_tokens.alone, parts.max_tokens), parts.kv.device)
        self.replayed: list[int] = []

    def _capture(self, size: int, forward: ForwardPass) -> Captured:
        numbers, last = torch.zeros((2, size), dtype=torch.int64), torch.zeros(min(PROMPTS, size), dtype=torch.int64)
        self._run = forward
        logits, features = forward(Cutter(numbers[1], self._places, lambda *_: None), numbers[0], numbers[1], last)
        for place in self._places.made:
            place.fill_(torch.nan)
        return Captured(numbers, last, (), logits, features)

    def _replay(self, captured: Captured, tokens: int, step: LayerAttention) -> None:
        def compute(attention: Attention, places: Sequence[Tensor]) -> None:
            query, key, value, output = places
            output[:tokens] = attention(step, query[:tokens], key[:tokens], value[:tokens])
            output[tokens:] = 0

        self.replayed.append(captured.numbers.shape[1])
        numbers, cutter = captured.numbers, Cutter(captured.numbers[1], self._places, compute)
        for place, result in zip((captured.logits, captured.features), self._run(cutter, *numbers, captured.last), strict=True):
            if place is not None:
                place.copy_(result)


@pytest.fixture
def as_if_captured() -> Callable[[LLM], AsIfCaptured]:
    """Have an engine on a CPU run its decode tokens as if they were captured steps."""

    def change(llm: LLM) -> AsIfCaptured:
        graphs = AsIfCaptured(llm)
        runner = llm.engine.runner
        runner._graphs, runner.captures = graphs, True
        if in_pieces(llm.shape):
            runner._chunks = ChunksAsIfCaptured(llm)
        return graphs

    return change
