"""What methods have in common that keep state of every request and choose inside each layer, with its own query."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.errors import ConfigError
from specontext.retrieval.selector import Budget, LaneTokens, LayerSelector, LayerView, MethodContext, Selector


@dataclass(frozen=True)
class Table:
    """A part of the state.

    Attributes:
        size: of one layer and seat.
        tokens_each: tokens that one entry of the second dimension stands for, so that no more than is in use is saved; 0 where
            everything is.
    """

    size: tuple[int, ...]
    dtype: torch.dtype
    tokens_each: int = 0

    def used(self, tokens: int) -> int:
        """Entries of the second dimension that a request of `tokens` tokens may use."""
        return min(self.size[1], tokens // self.tokens_each + 1) if self.tokens_each else self.size[1]


@dataclass(frozen=True)
class SavedState:
    """The state of one request in host memory: its tables, and the length of its prompt, None before its first decode step."""

    tables: dict[str, Tensor]
    prompt: int | None


class StatefulSelector(LayerSelector):
    """A method with tables for every (layer, seat), which it fills when a request takes its first decode step.

    Then the keys of the whole prompt are stored, so it makes no difference in which chunks they came. One set of tokens is
    chosen for each KV head.

    Attributes:
        tables: [L, seats + 1, *size] each; the last row belongs to no seat and takes what is to be dropped.
        prompts: int64 [seats + 1], where the first decode step of each request stood.

    Raises:
        ConfigError: a granularity other than 'head'.
    """

    def __init__(self, context: MethodContext) -> None:
        if context.granularity != "head":
            name = type(self).__module__.rpartition(".")[2].replace("_", "-")  # a method's file is called as it is
            raise ConfigError(
                f"method {name} chooses for every KV head and cannot work with granularity '{context.granularity}': "
                "set granularity to 'head'"
            )
        super().__init__(context)
        shape, self.seats = context.shape, context.seats
        self.layout = self.tables_for(context)
        self.tables = {
            name: torch.zeros((shape.layers, context.seats + 1, *table.size), dtype=table.dtype, device=context.device)
            for name, table in self.layout.items()
        }
        self.prompts = torch.zeros(context.seats + 1, dtype=torch.int64, device=context.device)
        # Both are shared with `with_budget` copies, like the tables.
        self._prompt_of: dict[int, int] = {}
        self._fresh: list[set[int]] = [set() for _ in range(shape.layers)]
        self._asked: tuple[LaneTokens, list[tuple[int, int]]] | None = None
        self._ends: tuple[LaneTokens, Tensor] | None = None

    def variant(self, name: str) -> Selector:
        """The same, choosing among the tokens of prompts only ('prompt')."""
        assert name == "prompt"
        other = copy.copy(self)
        other.keep_generated, other._ends = True, None
        return other

    def with_budget(self, budget: Budget) -> Self:
        other = super().with_budget(budget)
        other._ends = None
        return other

    # What a method has to say ------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def tables_for(cls, context: MethodContext) -> dict[str, Table]:
        """The tables that the method needs."""

    @abstractmethod
    def learn(self, layer: int, row: int, seat: int, view: LayerView) -> None:
        """Build the state of a request whose prompt, of `self.prompt(seat)` tokens, is stored."""

    def follow(self, layer: int, lane: LaneTokens, view: LayerView) -> None:
        """Take notice of the tokens of this step, before choosing; not called where all generated tokens are read."""

    @abstractmethod
    def choose(self, layer: int, lane: LaneTokens, view: LayerView, ends: Tensor) -> Tensor:
        """The best candidates among the positions sink .. ends[r] - 1.

        Returns:
            int64 [R, Hkv, K], K at most `budget.scored`: ascending, then -1 where there is none.
        """

    # The step ----------------------------------------------------------------------------------------------------------

    def select_in_layer(self, layer: int, lane: LaneTokens, view: LayerView) -> Selection:
        fresh = self._fresh[layer]
        if fresh:
            for row, (seat, position) in enumerate(self.on_host(lane)):
                if seat in fresh:
                    fresh.discard(seat)
                    self._set_prompt(seat, position)
                    self.learn(layer, row, seat, view)
        if not self.keep_generated:
            self.follow(layer, lane, view)
        chosen = self.choose(layer, lane, view, self.ends(lane))
        if self.keep_generated:
            return self.budget.compose_after(chosen, lane.lengths, self.prompts[lane.seats])
        return self.budget.compose(chosen, lane.lengths)

    def ends(self, lane: LaneTokens) -> Tensor:
        """End of the candidates of each request, the same in all layers: int64 [R]."""
        if self._ends is None or self._ends[0] is not lane:
            if self.keep_generated:
                ends = self.budget.prompt_end(lane.lengths, self.prompts[lane.seats])
            else:
                ends = self.budget.candidates_end(lane.lengths)
            self._ends = lane, ends
        return self._ends[1]

    @property
    def asks_host(self) -> bool:
        """State of a request is built in its first decode step, layer by layer, from what the host knows of it."""
        return any(self._fresh)

    def prompt(self, seat: int) -> int:
        """Tokens of the prompt of a request that decodes."""
        return self._prompt_of[seat]

    def on_host(self, lane: LaneTokens) -> list[tuple[int, int]]:
        """Seat and position of every token of the step; the device is asked once for all layers."""
        if self._asked is None or self._asked[0] is not lane:
            self._asked = lane, list(zip(lane.seats.tolist(), lane.positions.tolist(), strict=True))
        return self._asked[1]

    def _set_prompt(self, seat: int, tokens: int) -> None:
        self._prompt_of[seat] = tokens
        self.prompts[seat] = tokens

    # State of a seat ---------------------------------------------------------------------------------------------------

    def open(self, seat: int, tokens: int) -> bool:
        for table in self.tables.values():
            table[:, seat] = 0
        for fresh in self._fresh:
            fresh.add(seat)
        return True

    def close(self, seat: int) -> None:
        self._prompt_of.pop(seat, None)
        for fresh in self._fresh:
            fresh.discard(seat)

    def save(self, seat: int, tokens: int) -> SavedState:
        used = {name: table[:, seat, :, : self.layout[name].used(tokens)] for name, table in self.tables.items()}
        return SavedState({name: part.to("cpu", copy=True) for name, part in used.items()}, self._prompt_of.get(seat))

    def restore(self, seat: int, tokens: int, state: object) -> None:
        if state is None:  # there was nothing to save
            return
        assert isinstance(state, SavedState)
        for name, part in state.tables.items():
            self.tables[name][:, seat, :, : part.shape[2]] = part.to(self.prompts.device)
        if state.prompt is not None:
            self._set_prompt(seat, state.prompt)
            for fresh in self._fresh:
                fresh.discard(seat)

    @classmethod
    def state_bytes(cls, context: MethodContext) -> int:
        one = sum(math.prod(table.size) * table.dtype.itemsize for table in cls.tables_for(context).values())
        return (context.seats + 1) * (context.shape.layers * one + torch.int64.itemsize)


def group_logits(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Logits of the query heads of each KV head.

    Args:
        query: [R, Hq, D].
        keys: float32 [R, Hkv, N, D].

    Returns:
        float32 [R, Hkv, Hq / Hkv, N].
    """
    return (query.float() * scale).unflatten(1, (keys.shape[1], -1)) @ keys.mT
