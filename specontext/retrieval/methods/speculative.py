"""SpeContext's own method (C1): the retrieval head selects once, before the model runs, for all layers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from specontext.core import Batch, ModelShape, Selection
from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.retrieval.granularity import choose, groups_of
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.key_cache import KeyCache
from specontext.retrieval.selector import AheadSelector, Budget, DecodeTokens, uniform_map


class SpeculativeSelector(AheadSelector):
    """Scores all keys of the retrieval head with the query of the token about to be processed.

    A request's state is its keys and what the head saw of the target at its last token; both change only here. A query is made
    before the forward pass and a key after it, which is in time: at least the query's own token is read in any case.

    Attributes:
        last_fused: [seats + 1, H], what `RetrievalHead.fuse` gave of each seat's last token; None for the embedding variant.
    """

    def __init__(
        self, shape: ModelShape, budget: Budget, head: RetrievalHead, embedding: nn.Module, cache: KeyCache, *, granularity: str
    ) -> None:
        c = head.config
        self.shape, self.budget, self.head, self.embedding, self.cache = shape, budget, head, embedding, cache
        self.granularity = granularity
        self.groups = groups_of(granularity, c.kv_heads)
        own_map = granularity == "head" and c.head_map is not None
        self.head_map = torch.tensor(c.head_map) if own_map else uniform_map(shape, self.groups)
        sees = c.variant == "features"
        self.last_fused = cache.keys.new_zeros((cache.table.shape[0], c.hidden_size)) if sees else None

    def choosing(self, variant: str) -> SpeculativeSelector:
        """The same head with one set for all KV heads ('union', 'batch'), or with the identity head map."""
        other = copy.copy(self)
        other.granularity = "head" if variant == "identity" else variant
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

    def close(self, seat: int) -> None:
        self.cache.close(seat)

    def save(self, seat: int, tokens: int) -> object:
        fused = None
        if self.last_fused is not None:
            fused = self.last_fused[seat].to("cpu", copy=True)  # on a CPU, too: others take the seat
        return self.cache.keys_of(seat, tokens).cpu(), fused

    def restore(self, seat: int, tokens: int, state: object) -> None:
        assert isinstance(state, tuple)
        keys, fused = state
        positions = torch.arange(tokens, device=self.cache.keys.device)
        self.cache.append(torch.full_like(positions, seat), positions, keys.to(self.cache.keys.device))
        if self.last_fused is not None:
            self.last_fused[seat] = fused.to(self.last_fused.device)

    def select(self, step: DecodeTokens) -> Selection:
        before = None if self.last_fused is None else self.last_fused[step.seats]
        queries = self.head.queries(self._embed(step.token_ids), before, step.positions)
        pages, stops = self.cache.pages_of(step.seats, step.span), self.budget.candidates_end(step.lengths)
        keys, groups = self.cache.keys, self.head.config.kv_heads
        scores = paged_retrieval_scores(queries, keys, pages, self.budget.sink, stops, step.span, groups)
        return self.budget.compose(choose(scores, self.granularity, self.budget.scored), step.lengths)

    def observe(self, batch: Batch, features: Tensor | None) -> None:
        fused = before = None
        if self.last_fused is not None:
            assert features is not None
            fused = self.head.fuse(features.to(self.last_fused.dtype))
            before = fused.roll(1, dims=0)  # of the token before, inside a chunk
            for segment in batch.prefills:
                before[segment.offset] = self.last_fused[segment.seat]
            decodes = slice(0, batch.num_decodes)
            before[decodes] = self.last_fused[batch.seats[decodes]]
        keys = self.head.keys(self._embed(batch.token_ids), fused, before, batch.positions)
        self.cache.append(batch.seats, batch.positions, keys)
        if self.last_fused is not None and fused is not None:
            self.last_fused.index_copy_(0, batch.seats[batch.last_tokens], fused[batch.last_tokens])

    def _embed(self, token_ids: Tensor) -> Tensor:
        return self.head.embedded(token_ids, self.embedding).to(self.cache.keys.dtype)

    def selection_bytes(self, step: DecodeTokens) -> Tensor:
        """The head's keys of the whole context."""
        keys = self.cache.keys
        return step.lengths * (keys.shape[-2] * keys.shape[-1] * keys.element_size())

    @property
    def held_pages(self) -> list[list[int]]:
        return self.cache.held
