"""What several tests of the engine share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from specontext import LLM
from specontext.engine.graphs import DecodeGraphs, DecodeStep, _Captured, _Kind, _padding, decode_batch, sizes


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


@pytest.fixture
def as_if_captured() -> Callable[[LLM], AsIfCaptured]:
    """Have an engine on a CPU run its decode tokens as if they were captured steps."""

    def change(llm: LLM) -> AsIfCaptured:
        graphs = AsIfCaptured(llm)
        runner = llm.engine.runner
        runner._graphs, runner.captures = graphs, True
        return graphs

    return change
