"""ShadowKV's selection: chunks by the mean of their keys, with outlier chunks kept (https://arxiv.org/abs/2410.21465)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from specontext.kernels.blocks import follow_means
from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.retrieval.by_blocks import BlockSelector, LaneBlocks
from specontext.retrieval.selector import LaneTokens, LayerView, MethodContext
from specontext.retrieval.stateful import Table

CHUNK = 8  # tokens
OUTLIERS = 48  # chunks at most; the paper's number, beside 256 chunks that are chosen


class ShadowKVSelector(BlockSelector):
    """Reads the chunks of 8 tokens whose mean key has the greatest logit, and those of which the mean says little.

    The paper's: landmarks, the means of the keys of a chunk after RoPE; the chunks of the prompt with the smallest least cosine
    similarity of a key to its mean are outliers, which are always read and do not compete; the others compete by softmax weight,
    with the maximum over the query heads of a group.

    Ours: the outliers are inside the budget, in the paper's proportion of 48 to 256 chunks and at most 48; chunks begin after the
    sinks; generated tokens get landmarks of their own as they come, and the last chunk has the mean of what is there. The paper
    reads all generated tokens, which is the variant for prompts only. Its low-rank keys concern where entries live and not
    which are chosen, and are left out.
    """

    size = CHUNK

    @classmethod
    def tables_for(cls, context: MethodContext) -> dict[str, Table]:
        shape, chunks = context.shape, cls.entries(context)
        return {
            "landmarks": Table((shape.kv_heads, chunks, shape.head_dim), shape.dtype, CHUNK),
            "sums": Table((shape.kv_heads, shape.head_dim), torch.float32),  # of the keys of the last chunk
            "outliers": Table((shape.kv_heads, chunks), torch.uint8, CHUNK),  # ranks, the farthest out has 1; 0 for the others
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
        order = whole - 1 - nearness.flip(0).argsort(dim=0, stable=True)[:OUTLIERS]  # [chunks, Hkv]
        ranks = torch.arange(1, len(order) + 1, dtype=torch.uint8, device=order.device).expand(order.shape[1], -1)
        self.tables["outliers"][layer, seat].scatter_(-1, order.T, ranks)

    def follow(self, layer: int, lane: LaneTokens, view: LayerView) -> None:
        landmarks, sums = self.tables["landmarks"][layer], self.tables["sums"][layer]
        follow_means(landmarks, sums, view.key, lane.positions, lane.seats, CHUNK, self.budget.sink)

    def weights(self, layer: int, view: LayerView, blocks: LaneBlocks) -> Tensor:
        query = view.query.reshape(len(blocks.counts), -1, self.shape.head_dim)
        return paged_retrieval_scores(
            query,
            self.paged("landmarks", layer),
            blocks.pages,
            0,
            blocks.counts,
            blocks.most,
            scale=view.scale,
            ranks=self.paged("outliers", layer)[..., 0] if self.outliers else None,
            reserved=self.outliers,
        )

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """A vector of every chunk, and its rank where outliers are read."""
        each = self.shape.head_dim * self.shape.dtype.itemsize + min(1, self.outliers) * torch.uint8.itemsize
        return self.counts(self.ends(lane)) * (each * self.shape.layers * self.shape.kv_heads)
