"""ClusterKV: tokens whose keys point the same way are read together (https://arxiv.org/abs/2412.03213)."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.top_k import top_k_positions
from specontext.retrieval.clustering import cosine_clusters
from specontext.retrieval.selector import LaneTokens, LayerView, MethodContext
from specontext.retrieval.stateful import StatefulSelector, Table, group_logits

TOKENS = 80  # for each cluster
WINDOW = 320  # generated tokens that are clustered together


class ClusterKVSelector(StatefulSelector):
    """Reads the clusters of tokens whose mean keys have the greatest logits; of the last one only what fits.

    The paper's: k-means by cosine similarity over the keys of the prompt without its sinks, one cluster for 80 tokens; of every
    320 generated tokens four new clusters; a cluster is scored by the product of query and mean key.

    Ours: clusters are made for each KV head and scored by the greatest softmax weight over the clusters that a query head of its
    group gives; the first means are evenly spaced keys, so nothing is random; of a cluster that does not fit the last tokens are
    read; and generated tokens that wait for their window to fill compete as clusters of one token, because a small budget
    could not hold them all.
    """

    @classmethod
    def tables_for(cls, context: MethodContext) -> dict[str, Table]:
        shape = context.shape
        clusters = context.max_tokens // TOKENS + 1
        numbers = torch.int16 if clusters < 1 << 15 else torch.int32
        return {
            "means": Table((shape.kv_heads, clusters, shape.head_dim), shape.dtype, TOKENS),
            "clusters": Table((shape.kv_heads, context.max_tokens), numbers, 1),  # of every token
            "waiting": Table((shape.kv_heads, WINDOW, shape.head_dim), shape.dtype),  # keys of the tokens of this window
        }

    @property
    def asks_host(self) -> bool:
        """Where generated tokens are scored too, positions decide when a window is complete."""
        return super().asks_host or not self.keep_generated

    def learn(self, layer: int, row: int, seat: int, view: LayerView) -> None:
        sink, prompt = self.budget.sink, self.prompt(seat)
        if prompt > sink:
            self._add(layer, seat, view.keys(row, sink, prompt).transpose(0, 1), sink, 0, -(-(prompt - sink) // TOKENS))

    def follow(self, layer: int, lane: LaneTokens, view: LayerView) -> None:
        waiting = self.tables["waiting"][layer]
        place = lane.positions - self._first(lane.seats)
        rows = torch.where(place >= 0, lane.seats, self.seats)  # sinks are not clustered
        waiting[rows, :, place % WINDOW] = view.key
        for seat, position in self.on_host(lane):
            first = max(self.prompt(seat), self.budget.sink)
            done = position + 1 - first
            if done > 0 and done % WINDOW == 0:
                before = -(-(first - self.budget.sink) // TOKENS) + (done - WINDOW) // TOKENS
                self._add(layer, seat, waiting[seat], position + 1 - WINDOW, before, WINDOW // TOKENS)

    def _add(self, layer: int, seat: int, keys: Tensor, start: int, before: int, count: int) -> None:
        """Cluster the tokens from `start` on, with keys [Hkv, n, D], when there are `before` clusters already."""
        means, numbers = cosine_clusters(keys.float(), count)
        stored = self.tables["means"][layer, seat]
        stored[:, before : before + count] = means.to(stored.dtype)
        clusters = self.tables["clusters"][layer, seat]
        clusters[:, start : start + keys.shape[1]] = (numbers + before).to(clusters.dtype)

    def choose(self, layer: int, lane: LaneTokens, view: LayerView, ends: Tensor) -> Tensor:
        seats, sink = lane.seats, self.budget.sink
        means = self.tables["means"][layer][:, :, : lane.span // TOKENS + 1].index_select(0, seats).float()
        many = means.shape[2]
        first = self._first(seats)
        windows = 0 if self.keep_generated else (lane.lengths - first).clamp(min=0) // WINDOW  # that were clustered
        known = -(-(first - sink) // TOKENS) + windows * (WINDOW // TOKENS)
        number = torch.arange(many, device=seats.device)
        logits = group_logits(view.query, means, view.scale).masked_fill_((number >= known[:, None])[:, None, None], -torch.inf)
        position = torch.arange(lane.span, device=seats.device)
        owner = self.tables["clusters"][layer][:, :, : lane.span].index_select(0, seats).long()  # [R, Hkv, S]
        if not self.keep_generated:
            start = first + windows * WINDOW  # of those that wait
            waiting = self.tables["waiting"][layer].index_select(0, seats).float()
            place = torch.arange(WINDOW, device=seats.device)
            absent = (place >= (lane.lengths - start)[:, None])[:, None, None]
            alone = group_logits(view.query, waiting, view.scale).masked_fill_(absent, -torch.inf)
            logits = torch.cat((logits, alone), dim=-1)
            after = position - start[:, None]  # [R, S]
            owner = torch.where((after >= 0)[:, None], many + after.clamp(0, WINDOW - 1)[:, None], owner)
        weights = torch.softmax(logits, dim=-1).nan_to_num_(0.0).amax(2)
        candidate = (position >= sink) & (position < ends[:, None])
        scores = torch.where(candidate[:, None], weights.gather(-1, owner), -1.0)
        return top_k_positions(scores, self.budget.scored)

    def _first(self, seats: Tensor) -> Tensor:
        """Position of the first generated token that is clustered: int64 [R]."""
        return self.prompts[seats].clamp(min=self.budget.sink)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """The mean of every cluster, the cluster of every token, and the keys of those that wait."""
        tokens = (self.ends(lane) - self.budget.sink).clamp(min=0)
        vector = self.shape.head_dim * self.shape.dtype.itemsize
        first = self._first(lane.seats)
        vectors = (first - self.budget.sink + TOKENS - 1) // TOKENS
        if not self.keep_generated:
            generated = (lane.lengths - first).clamp(min=0)
            vectors = vectors + generated // WINDOW * (WINDOW // TOKENS) + generated % WINDOW
        numbers = self.layout["clusters"].dtype.itemsize
        return (vectors * vector + tokens * numbers) * (self.shape.layers * self.shape.kv_heads)
