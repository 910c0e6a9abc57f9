"""ShadowKV's selection: chunks by the mean of their keys, with outlier chunks kept (https://arxiv.org/abs/2410.21465)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from specontext.kernels.retrieval_scores import group_weights
from specontext.retrieval.blocks import candidate_blocks, place_of, whole_blocks
from specontext.retrieval.selector import LaneTokens, LayerView, MethodContext
from specontext.retrieval.stateful import StatefulSelector, Table, group_logits

CHUNK = 8  # tokens
OUTLIERS = 48  # chunks at most; the paper's number, beside 256 chunks that are chosen
ALWAYS = 2.0  # more than any softmax weight


class ShadowKVSelector(StatefulSelector):
    """Reads the chunks of 8 tokens whose mean key has the greatest logit, and those of which the mean says little.

    The paper's: landmarks, the means of the keys of a chunk after RoPE; the chunks of the prompt with the smallest least cosine
    similarity of a key to its mean are outliers, which are always read and do not compete; the others compete by softmax weight,
    with the maximum over the query heads of a group.

    Ours: the outliers are inside the budget, in the paper's proportion of 48 to 256 chunks and at most 48; chunks begin after the
    sinks; generated tokens get landmarks of their own as they come, and the last chunk has the mean of what is there. The paper
    reads all generated tokens, which is the variant for prompts only. Its low-rank keys concern where entries live and not
    which are chosen, and are left out.
    """

    @classmethod
    def tables_for(cls, context: MethodContext) -> dict[str, Table]:
        shape = context.shape
        chunks = max(1, -(-(context.max_tokens - context.budget.sink) // CHUNK))
        return {
            "landmarks": Table((shape.kv_heads, chunks, shape.head_dim), shape.dtype, CHUNK),
            "sums": Table((shape.kv_heads, shape.head_dim), torch.float32),  # of the keys of the last chunk
            "outliers": Table((shape.kv_heads, OUTLIERS), torch.int32),  # chunks + 1, the farthest out first; then 0
        }

    @property
    def outliers(self) -> int:
        """Outlier chunks that are read, where the prompt has as many."""
        return min(OUTLIERS, self.budget.scored // CHUNK * OUTLIERS // (256 + OUTLIERS))

    def learn(self, layer: int, row: int, seat: int, view: LayerView) -> None:
        if self.prompt(seat) <= self.budget.sink:
            return
        keys = view.keys(row, self.budget.sink, self.prompt(seat)).float()
        whole = len(keys) // CHUNK
        chunks = keys[: whole * CHUNK].unflatten(0, (whole, CHUNK))
        means, landmarks = chunks.mean(1), self.tables["landmarks"][layer, seat]
        landmarks[:, :whole] = means.transpose(0, 1).to(landmarks.dtype)
        if rest := len(keys) % CHUNK:
            self.tables["sums"][layer, seat] = keys[-rest:].sum(0)
            landmarks[:, whole] = (keys[-rest:].sum(0) / rest).to(landmarks.dtype)
        nearness = cosine_similarity(chunks, means[:, None], dim=-1).amin(1)  # [chunks, Hkv]
        # The later of two equal chunks is farther out.
        order = whole - nearness.flip(0).argsort(dim=0, stable=True)[:OUTLIERS]
        self.tables["outliers"][layer, seat, :, : len(order)] = order.T.int()

    def follow(self, layer: int, lane: LaneTokens, view: LayerView) -> None:
        landmarks, sums = self.tables["landmarks"][layer], self.tables["sums"][layer]
        rows, chunks, places = place_of(lane.positions, lane.seats, CHUNK, self.budget.sink, self.seats)
        places = places[:, None, None]
        total = torch.where(places == 0, 0.0, sums[rows]) + view.key.float()
        sums[rows] = total
        landmarks[rows, :, chunks] = (total / (places + 1)).to(landmarks.dtype)

    def choose(self, layer: int, lane: LaneTokens, view: LayerView, ends: Tensor) -> Tensor:
        sink = self.budget.sink
        chunks = max(1, -(-(lane.span - sink) // CHUNK))
        landmarks = self.tables["landmarks"][layer][:, :, :chunks].index_select(0, lane.seats)
        kept = self.tables["outliers"][layer][:, :, : self.outliers].index_select(0, lane.seats).long()
        outlier = torch.zeros((*landmarks.shape[:2], chunks + 1), dtype=torch.bool, device=kept.device)
        outlier = outlier.scatter_(-1, kept, True)[..., 1:]  # place 0 is for those that are not there
        logits = group_logits(view.query, landmarks.float(), view.scale).masked_fill_(outlier[:, :, None], -torch.inf)
        weights = group_weights(logits, 0, candidate_blocks(ends, CHUNK, sink))
        weights.masked_fill_(outlier & (weights >= 0), ALWAYS)
        return whole_blocks(weights, CHUNK, sink, ends, self.budget.scored)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """A vector of every chunk, and the numbers of the outliers."""
        chunks = candidate_blocks(self.ends(lane), CHUNK, self.budget.sink)
        numbers = self.outliers * torch.int32.itemsize
        vectors = chunks * (self.shape.head_dim * self.shape.dtype.itemsize)
        return (vectors + numbers) * (self.shape.layers * self.shape.kv_heads)
