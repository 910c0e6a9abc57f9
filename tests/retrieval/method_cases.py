"""Random conversations for selection methods, and an engine in miniature that runs a method on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.core import Segment, Selection
from specontext.model_shape import ModelShape
from specontext.retrieval.selector import Budget, LaneTokens, MethodContext, PromptWatcher, Selector

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8
SCALE = HEAD_DIM**-0.5
SHAPE = ModelShape(LAYERS, 32, QUERY_HEADS, KV_HEADS, HEAD_DIM, 9, 4096, torch.float32)
Sets = list[list[list[int]]]  # of one step: tokens by layer and KV head


def context(budget: Budget, *, seats: int = 4, max_tokens: int = 400, granularity: str = "head") -> MethodContext:
    return MethodContext(SHAPE, budget, granularity, seats, max_tokens, torch.device("cpu"))


@dataclass(frozen=True)
class Talk:
    """Keys [L, N, Hkv, D] and queries [L, N, Hq, D] of a conversation whose first `prompt` tokens are the prompt."""

    keys: Tensor
    queries: Tensor
    prompt: int

    @classmethod
    def random(cls, prompt: int, steps: int, seed: int) -> Talk:
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(LAYERS, prompt + steps, KV_HEADS, HEAD_DIM, generator=generator)
        queries = 2.0 * torch.randn(LAYERS, prompt + steps, QUERY_HEADS, HEAD_DIM, generator=generator)
        return cls(keys, queries, prompt)


class View:
    """What a layer shows of some talks that stand at `positions`."""

    def __init__(self, talks: Sequence[Talk], positions: Sequence[int], layer: int) -> None:
        self.talks, self.positions, self.layer, self.scale = talks, positions, layer, SCALE
        self.query = torch.stack([talk.queries[layer, p] for talk, p in zip(talks, positions, strict=True)])
        self.key = torch.stack([talk.keys[layer, p] for talk, p in zip(talks, positions, strict=True)])

    def logits(self) -> Tensor:
        logits = torch.full((len(self.talks), QUERY_HEADS, max(self.positions) + 1), -torch.inf)
        for row, position in enumerate(self.positions):
            keys = self.keys(row, 0, position + 1).repeat_interleave(QUERY_HEADS // KV_HEADS, dim=1)
            logits[row, :, : position + 1] = torch.einsum("hd,shd->hs", self.query[row] * self.scale, keys)
        return logits

    def logits_of(self, tokens: Tensor) -> Tensor:
        rows = tokens.repeat_interleave(QUERY_HEADS // KV_HEADS, dim=1)
        return torch.where(rows >= 0, self.logits().gather(-1, rows.clamp(min=0)), -torch.inf)

    def keys(self, row: int, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= self.positions[row] + 1, "these keys are not stored"
        return self.talks[row].keys[self.layer, start:stop]


def prefill(selector: Selector, seat: int, talk: Talk, chunk: int = 1 << 20) -> None:
    """Open a seat and show the prompt in chunks."""
    selector.open(seat, talk.prompt)
    for start in range(0, talk.prompt, chunk):
        stop = min(start + chunk, talk.prompt)
        for layer in range(LAYERS):
            if isinstance(selector, PromptWatcher):
                segment = Segment(seat, start, stop - start, 0)
                stored = talk.keys[layer, :stop]
                selector.observe_chunk(layer, segment, talk.queries[layer, start:stop], SCALE, lambda stored=stored: stored)


def decode(selector: Selector, seats: Sequence[int], talks: Sequence[Talk], step: int) -> list[Selection]:
    """Selections of all layers in decode step number `step` of every talk."""
    positions = [talk.prompt + step for talk in talks]
    rows = torch.tensor(positions)
    none = torch.zeros_like(rows)
    tokens = LaneTokens(none, torch.tensor(list(seats)), rows, rows + 1, none, max(positions) + 1)
    return [selector.select_in_layer(layer, tokens, View(talks, positions, layer)) for layer in range(LAYERS)]


def sets_of(selections: Sequence[Selection], row: int) -> Sets:
    """What one request reads, in the order of its selections."""
    return [[[t for t in head.tolist() if t >= 0] for head in selection.tokens[row]] for selection in selections]


def run(selector: Selector, talk: Talk, steps: int, *, seat: int = 0, chunk: int = 1 << 20) -> list[Sets]:
    """What a request reads in each of its first decode steps."""
    prefill(selector, seat, talk, chunk)
    return [sets_of(decode(selector, [seat], [talk], step), 0) for step in range(steps)]
