"""What a selection method is: a policy that names KV entries and knows nothing of memory."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from specontext.core import Batch, Segment, Selection
from specontext.kernels.top_k import ALWAYS, groups_of, selected_tokens
from specontext.model_shape import ModelShape
from specontext.retrieval.head import RetrievalHead

if TYPE_CHECKING:  # it makes them
    from specontext.retrieval.methods.speculative import KeyCache


@dataclass(frozen=True)
class LaneTokens:
    """The decode tokens of a lane in a step, one a request.

    Attributes:
        token_ids, seats, positions, seeds: int64 [R]; a negative position is padding.
        lengths: int64 [R], tokens in context, the one being processed included; 0 for padding.
        span: no request has more tokens in context; known without asking the device.
    """

    token_ids: Tensor
    seats: Tensor
    positions: Tensor
    lengths: Tensor
    seeds: Tensor
    span: int

    @classmethod
    def part(cls, batch: Batch, part: slice, span: int) -> LaneTokens:
        """Some of the decode tokens of a batch, the longest context of which has `span` tokens."""
        return cls(batch.token_ids[part], batch.seats[part], batch.positions[part], batch.lengths[part], batch.seeds[part], span)


@dataclass(frozen=True)
class Budget:
    """How many entries a KV head reads: `sink` first tokens, `recent` last tokens, the rest chosen by score."""

    total: int
    sink: int
    recent: int

    @cached_property
    def scored(self) -> int:
        return self.total - self.sink - self.recent

    def candidates_end(self, lengths: Tensor) -> Tensor:
        """End of the positions sink .. end - 1 that compete by score."""
        return (lengths - self.recent).clamp(min=self.sink)

    def compose(self, scored: Tensor, lengths: Tensor) -> Selection:
        """The selection of sinks, scored tokens and recent tokens.

        Args:
            scored: int64 [R, G, K] ascending candidates, then -1 where there is none.
            lengths: int64 [R].
        """
        return Selection(*selected_tokens(scored, lengths, None, sink=self.sink, width=self.recent))

    def compose_what_exceeds(self, scored: Tensor, lengths: Tensor) -> Selection:
        """The same, but contexts that fit the budget are read whole, whatever was chosen."""
        return Selection(*selected_tokens(scored, lengths, None, sink=self.sink, width=self.recent, whole=self.total))

    def compose_last(self, lengths: Tensor, groups: int = 1) -> Selection:
        """Sinks and as many last tokens as there is room for: contexts that fit the budget are read whole."""
        scored = lengths.new_empty(()).expand(len(lengths), groups, self.scored)
        return Selection(*selected_tokens(scored, lengths, None, sink=self.sink, width=self.recent, whole=ALWAYS))

    def compose_after(self, scored: Tensor, lengths: Tensor, prompts: Tensor) -> Selection:
        """The same with all tokens after the prompt, besides the budget: what methods read that select from the prompt only.

        Args:
            scored: int64 [R, G, K] ascending candidates before the end that `prompt_end` gives, then -1 where there is none.
            prompts: int64 [R], tokens of the prompts.
        """
        ends = self.prompt_end(lengths, prompts)
        width = max(int((lengths - ends).max()), 0)
        return Selection(*selected_tokens(scored, lengths, ends, sink=self.sink, width=width))

    def prompt_end(self, lengths: Tensor, prompts: Tensor) -> Tensor:
        """End of the candidates where all tokens after the prompt are read in any case."""
        return torch.minimum(self.candidates_end(lengths), prompts.clamp(min=self.sink))


@dataclass(frozen=True)
class MethodContext:
    """What a method is made of.

    Attributes:
        granularity: one set for each KV head, or one for all; see `granularity.py`.
        seats, max_tokens: requests at the same time and their longest context, for state that is kept for each.
        head, embedding, key_cache: for methods with a retrieval head: it, the model's table of embeddings, and what makes a place
            for keys of the head; memory is measured before there are the last two.
        part: what one of several ranks has of the shape; None where it has all.
        head_is_part: the head has the groups that the part reads, and no others.
    """

    shape: ModelShape
    budget: Budget
    granularity: str
    seats: int
    max_tokens: int
    device: torch.device
    head: RetrievalHead | None = None
    embedding: nn.Module | None = None
    key_cache: Callable[[], KeyCache] | None = None
    part: ModelShape | None = None
    head_is_part: bool = False


@dataclass(frozen=True)
class PageState:
    """What a method knows of pages of a prompt, so that a request that begins with the same tokens need not compute it.

    Attributes:
        each: [pages, numbers], of every page.
        last: [pages, numbers], of the last token of every page.
    """

    each: Tensor
    last: Tensor


class LayerView(Protocol):
    """What a layer shows a method that selects inside it.

    Attributes:
        query, key: [R, Hq, D] and [R, Hkv, D] of the tokens being processed, after RoPE.
        scale: factor of the attention logits.
    """

    query: Tensor
    key: Tensor
    scale: float

    def logits(self) -> Tensor:
        """The layer's true attention logits over the whole context, float32 [R, Hq, S]; -inf where a request has no token."""
        ...

    def logits_of(self, tokens: Tensor) -> Tensor:
        """Those of some tokens only, which attention is about to read: float32 [R, Hq, B].

        Args:
            tokens: int64 [R, Hkv, B], -1 for none, which has -inf.
        """
        ...

    def keys(self, row: int, start: int, stop: int) -> Tensor:
        """Stored keys of the lane's request `row` after RoPE, [stop - start, Hkv, D]; the token being processed is among them."""
        ...


class Selector(ABC):
    """A selection method: its state, by seat, and what everyone must know of it. Its copies (`with_budget`, `variant`) share it.

    One that chooses is an `AheadSelector`, which does so once before the forward pass and for all layers, or a `LayerSelector`,
    which does so inside each layer, because it needs that layer's query. Any other reads everything.

    Attributes:
        replay: last tokens of a prompt that it must see itself although their KV may be known from another request.
        by_span: what a decode step computes on the device depends on the lane's span, beyond the tokens that are read.
        groups: G, how many token sets it chooses for each request.
        head_map: int64 [L, Hkv], the group whose set a KV head reads.
        keep_generated: all tokens after the prompt are read, besides the budget.
    """

    replay: ClassVar[int] = 0
    by_span: ClassVar[bool] = True
    groups: int
    head_map: Tensor
    budget: Budget
    keep_generated: bool = False

    def __init__(self, context: MethodContext) -> None:
        """A method without state; KV head h reads the set of group h, or all the only one."""
        self.shape, self.budget, self.granularity = context.shape, context.budget, context.granularity
        self.groups = self.token_sets(context, None)
        self.head_map = uniform_map(self.shape, self.groups)

    def with_budget(self, budget: Budget) -> Self:
        """The same method with another budget, on the same state."""
        other = copy.copy(self)
        other.budget = budget
        return other

    @classmethod
    def token_sets(cls, context: MethodContext, variant: str | None) -> int:
        """G of a method or of a variant of it, known before it is made.

        Raises:
            ConfigError: it cannot work in this context.
        """
        return groups_of(context.granularity, context.shape.kv_heads)

    def variant(self, name: str) -> Selector:
        """A variant of the registry's entry, on the same state."""
        raise NotImplementedError

    @classmethod
    def state_bytes(cls, context: MethodContext) -> int:
        """Device bytes of its state of all seats."""
        return 0

    def open(self, seat: int, tokens: int) -> bool:
        """A request takes a seat, with room for its first `tokens` tokens; False where there is none, and nothing is taken."""
        return True

    def grow(self, seat: int, tokens: int) -> bool:
        """Make room for `tokens` tokens of a request; False where there is none, and nothing is taken."""
        return True

    def room(self, seat: int) -> int:
        """Tokens for which an open seat has room."""
        return sys.maxsize

    def close(self, seat: int) -> None:  # noqa: B027  methods without state have nothing to do
        """The request leaves its seat."""

    def save(self, seat: int, tokens: int) -> object:
        """The method's state of a request of `tokens` tokens that has to leave its seat, in host memory."""
        return None

    def restore(self, seat: int, tokens: int, state: object) -> None:  # noqa: B027
        """Put saved state into a seat that is open with room for it."""

    def observe(self, batch: Batch, features: Tensor | None) -> None:  # noqa: B027
        """See the tokens of a step after the forward pass, with their features [T, F * H] if the method taps any."""

    @abstractmethod
    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """Bytes that choosing has to read in a step, all layers together: int64 [R].

        A method that selects in the layer is asked after it has, any other one before.
        """

    @property
    def asks_host(self) -> bool:
        """Whether its next decode step asks the device for numbers, so that it cannot be captured."""
        return False

    @property
    def held_pages(self) -> list[list[int]]:
        """Pages of the device's arena that the method's state lies in."""
        return []

    # What is known of prompts, for methods whose state every request has -------------------------------------------------

    @property
    def page_tokens(self) -> int:
        """Tokens whose state fits into one page of the arena; 0 where none lies there."""
        return 0

    def page_numbers(self, tokens: int) -> tuple[int, int]:
        """Numbers in `PageState.each` and `last` of one page of `tokens` tokens."""
        return 0, 0

    def page_state(self, segment: Segment, first: int, stop: int, tokens: int, features: Tensor | None) -> PageState:
        """What is known of the pages first .. stop - 1 of a seat, of `tokens` tokens each, whose last ones are in a chunk.

        Args:
            features: [T, F * H] of the step, if the method taps any.
        """
        raise NotImplementedError

    def restore_pages(self, seat: int, tokens: int, state: PageState) -> None:
        """Put what is known of the first `tokens` tokens of a prompt into a seat; the first row of `last` is of the last one."""
        raise NotImplementedError


class AheadSelector(Selector):
    """Chooses before the forward pass, for all layers."""

    @abstractmethod
    def select(self, lane: LaneTokens) -> Selection:
        """Choose for all layers."""


class ForeseeingSelector(AheadSelector):
    """Has to know the true attention of a token in all layers before it selects for it."""

    @abstractmethod
    def look_anew(self) -> None:
        """Forget what has been seen: `foresee` follows for all layers."""

    @abstractmethod
    def foresee(self, layer: int, weights: Tensor) -> None:
        """See what full attention would weigh in a layer, layer after layer, right before `select`.

        Args:
            layer: whose KV is read; as often as layers read it.
            weights: float32 [R, Hq, S] of the tokens of the step.
        """


class LayerSelector(Selector):
    """Chooses inside each layer, with that layer's query."""

    @abstractmethod
    def select_in_layer(self, layer: int, lane: LaneTokens, view: LayerView) -> Selection:
        """Choose for one layer."""


@runtime_checkable
class PromptWatcher(Protocol):
    """A method that wants to see the queries of prompts."""

    def observe_chunk(self, layer: int, segment: Segment, query: Tensor, scale: float, keys: Callable[[], Tensor]) -> None:
        """See a chunk of a prompt in one layer, once its keys and values are stored.

        Args:
            query: [T, Hq, D] of the chunk, after RoPE.
            keys: gives the keys of all tokens up to the chunk's last one, [start + T, Hkv, D].
        """
        ...


def reads_everything(method: type[Selector] | Selector) -> bool:
    """Whether a method chooses nothing, so that decode tokens read all that is stored."""
    kind = method if isinstance(method, type) else type(method)
    return not issubclass(kind, AheadSelector | LayerSelector)


def uniform_map(shape: ModelShape, groups: int) -> Tensor:
    """Head map of KV head h to group h in every layer, or of all heads to the only group."""
    assert groups in (1, shape.kv_heads)
    row = torch.arange(shape.kv_heads) if groups > 1 else torch.zeros(shape.kv_heads, dtype=torch.int64)
    return row.expand(shape.layers, -1).clone()
