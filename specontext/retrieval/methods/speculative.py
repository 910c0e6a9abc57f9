"""SpeContext's own method (C1): the retrieval head selects once, before the model runs, for all layers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from specontext.core import Batch, Segment, Selection
from specontext.errors import ConfigError
from specontext.kernels.dispatch import upload
from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.kernels.rows import append_keys
from specontext.kernels.top_k import choose, groups_of
from specontext.memory.pages import PageAllocator
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.selector import AheadSelector, LaneTokens, MethodContext, PageState, Selector, uniform_map


class KeyCache:
    """Keys of the retrieval head for all tokens of all seats.

    Args:
        keys: [pages, page_size, key heads, D] on the device, page 0 zero; strides may leave gaps.
        pages: which of the pages are free; others may take some, too.

    Attributes:
        table: int64 [seats + 1, P], pages of every seat; the last row belongs to no seat.
    """

    def __init__(self, keys: Tensor, pages: PageAllocator, *, seats: int, max_tokens: int) -> None:
        self.keys, self.pages, self.page_size = keys, pages, keys.shape[1]
        self.table = torch.zeros((seats + 1, -(-max_tokens // self.page_size)), dtype=torch.int64, device=keys.device)
        self.held: list[list[int]] = [[] for _ in range(seats)]

    def grow(self, seat: int, tokens: int) -> bool:
        """Make room for `tokens` tokens of a seat; False where there are too few pages, and nothing is taken."""
        before = len(self.held[seat])
        new = -(-tokens // self.page_size) - before
        if new <= 0:
            return True
        if new > self.pages.num_free:
            return False
        pages = self.pages.allocate(new)
        self.held[seat] += pages
        numbers = upload(pages, torch.int64, self.keys.device)
        # Zeroed, so that a page that is not full yet never brings in values that are not numbers.
        self.keys.index_fill_(0, numbers, 0)
        self.table[seat, before : before + new] = numbers
        return True

    def close(self, seat: int) -> None:
        self.pages.free(self.held[seat])
        self.held[seat] = []
        self.table[seat] = 0

    def append(self, seats: Tensor, positions: Tensor, keys: Tensor) -> None:
        """Store keys [T, key heads, D] of tokens at `positions` [T] of `seats` [T]; those at negative positions are dropped."""
        append_keys(self.keys, self.table, seats, positions, keys)

    def pages_of(self, seats: Tensor, span: int) -> Tensor:
        """Pages of the positions 0 .. span - 1 of some seats: int64 [R, P]."""
        return self.table[:, : -(-span // self.page_size)].index_select(0, seats)

    def keys_of(self, seat: int, tokens: int, start: int = 0) -> Tensor:
        """A copy of the keys of a seat's tokens start .. tokens - 1: [tokens - start, key heads, D]."""
        first = start // self.page_size
        pages = self.table[seat, first : -(-tokens // self.page_size)]
        return self.keys[pages].flatten(0, 1)[start - first * self.page_size :][: tokens - start]


class SpeculativeSelector(AheadSelector):
    """Scores all keys of the retrieval head with the query of the token about to be processed; nothing, where the context fits
    the budget, since its selection is everything.

    A request's state is its keys and what the head saw of the target at its last token; both change only here. A query is made
    before the forward pass and a key after it, which is in time: at least the query's own token is read in any case.

    Attributes:
        last_fused: [seats + 1, H], what `RetrievalHead.fuse` gave of each seat's last token; None for the embedding variant.
    """

    def __init__(self, context: MethodContext) -> None:
        assert context.head is not None and context.embedding is not None and context.key_cache is not None
        self.shape, self.budget, self.granularity = context.shape, context.budget, context.granularity
        self.head, self.embedding, self.cache = context.head, context.embedding, context.key_cache()
        c = self.head.config
        self.groups = groups_of(self.granularity, c.kv_heads)
        own_map = self.granularity == "head" and c.head_map is not None
        self.head_map = torch.tensor(c.head_map) if own_map else uniform_map(self.shape, self.groups)
        sees = c.variant == "features"
        self.last_fused = self.cache.keys.new_zeros((self.cache.table.shape[0], c.hidden_size)) if sees else None

    @classmethod
    def token_sets(cls, context: MethodContext, variant: str | None) -> int:
        assert context.head is not None
        heads, groups = context.shape.kv_heads, context.head.config.kv_heads
        if variant == "identity" and groups != heads:
            raise ConfigError(
                f"method 'speculative-identity' needs a head with the model's {heads} KV heads, this one has {groups}"
            )
        return groups_of(cls._granularity(context.granularity, variant), groups)

    @staticmethod
    def _granularity(own: str, variant: str | None) -> str:
        return own if variant is None else "head" if variant == "identity" else variant

    def variant(self, name: str) -> Selector:
        """The same head with one set for all KV heads ('union', 'batch'), or with the identity head map."""
        other = copy.copy(self)
        other.granularity = self._granularity(self.granularity, name)
        other.groups = groups_of(other.granularity, self.head.config.kv_heads)
        other.head_map = uniform_map(self.shape, other.groups)
        return other

    def open(self, seat: int, tokens: int) -> bool:
        assert not self.cache.held[seat], f"seat {seat} is taken"
        if self.last_fused is not None:
            self.last_fused[seat] = 0
        return self.cache.grow(seat, tokens)

    def grow(self, seat: int, tokens: int) -> bool:
        return self.cache.grow(seat, tokens)

    def room(self, seat: int) -> int:
        return len(self.cache.held[seat]) * self.cache.page_size

    def close(self, seat: int) -> None:
        self.cache.close(seat)

    def save(self, seat: int, tokens: int) -> object:
        fused = None
        if self.last_fused is not None:
            fused = self.last_fused[seat].to("cpu", copy=True)  # on a CPU, too: others take the seat
        return self.cache.keys_of(seat, tokens).cpu(), fused

    def restore(self, seat: int, tokens: int, state: object) -> None:
        assert isinstance(state, tuple)
        self._restore(seat, *state)

    def _restore(self, seat: int, keys: Tensor, fused: Tensor | None) -> None:
        positions = torch.arange(len(keys), device=self.cache.keys.device)
        self.cache.append(torch.full_like(positions, seat), positions, keys.to(self.cache.keys.device))
        if self.last_fused is not None and fused is not None:
            self.last_fused[seat] = fused.to(self.last_fused.device)

    def select(self, lane: LaneTokens) -> Selection:
        budget, lengths = self.budget, lane.lengths
        if lane.span <= budget.total:
            return budget.compose_last(lengths, self.groups)
        before = None if self.last_fused is None else self.last_fused[lane.seats]
        queries = self.head.queries(
            self.head.embedded(lane.token_ids, self.embedding).to(self.cache.keys.dtype), before, lane.positions
        )
        # A context that fits is read whole, whoever is in the batch beside it: none of its keys is looked at.
        stops = torch.where(lengths <= budget.total, budget.sink, lengths - budget.recent)
        pages, keys, groups = self.cache.pages_of(lane.seats, lane.span), self.cache.keys, self.head.config.kv_heads
        scores = paged_retrieval_scores(queries, keys, pages, budget.sink, stops, lane.span, groups)
        return budget.compose_what_exceeds(choose(scores, self.granularity, budget.scored), lengths)

    def observe(self, batch: Batch, features: Tensor | None) -> None:
        fused = before = None
        if self.last_fused is not None:
            assert features is not None
            fused = self.head.fuse(features.to(self.last_fused.dtype))
            if batch.prefills:
                before = fused.roll(1, dims=0)  # of the token before, inside a chunk
                for segment in batch.prefills:
                    before[segment.offset] = self.last_fused[segment.seat]
                decodes = slice(0, batch.num_decodes)
                before[decodes] = self.last_fused[batch.seats[decodes]]
            else:
                before = self.last_fused[batch.seats]
        keys = self.head.keys(
            self.head.embedded(batch.token_ids, self.embedding).to(self.cache.keys.dtype), fused, before, batch.positions
        )
        self.cache.append(batch.seats, batch.positions, keys)
        if self.last_fused is not None and fused is not None:
            seats, last = batch.seats, fused
            if batch.prefills:
                seats, last = seats[batch.last_tokens], last[batch.last_tokens]
            self.last_fused.index_copy_(0, seats, last)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """The head's keys of the whole context; none where all of it is read."""
        keys = self.cache.keys
        scored = torch.where(lane.lengths <= self.budget.total, 0, lane.lengths)
        return scored * (keys.shape[-2] * keys.shape[-1] * keys.element_size())

    @property
    def held_pages(self) -> list[list[int]]:
        return self.cache.held

    @property
    def page_tokens(self) -> int:
        return self.cache.page_size

    def page_numbers(self, tokens: int) -> tuple[int, int]:
        """The head's keys, and what it saw at the last token."""
        return tokens * self.cache.keys[0, 0].numel(), 0 if self.last_fused is None else self.last_fused.shape[1]

    def page_state(self, segment: Segment, first: int, stop: int, tokens: int, features: Tensor | None) -> PageState:
        each = self.cache.keys_of(segment.seat, stop * tokens, first * tokens).reshape(stop - first, -1)
        if self.last_fused is None:
            return PageState(each, each.new_empty((stop - first, 0)))
        assert features is not None
        begin = segment.offset - segment.start
        last = features[begin + (first + 1) * tokens - 1 : begin + stop * tokens : tokens].to(each.dtype)
        return PageState(each, RetrievalHead.fuse(self.head, last))  # not what may be compiled: there may be a single page

    def restore_pages(self, seat: int, tokens: int, state: PageState) -> None:
        self._restore(seat, state.each.reshape(tokens, *self.cache.keys.shape[2:]), state.last[0])
