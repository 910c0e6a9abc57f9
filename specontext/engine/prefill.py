"""The prompt chunks of a step: they attend densely to what is stored, tile by tile, and causally to themselves."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specontext.core import Batch
from specontext.engine.methods import Methods
from specontext.engine.true_attention import keys_up_to
from specontext.kernels.dense_attention import ChunkAttention, causal_attention
from specontext.kernels.tables import NewTokens
from specontext.kv.dense import DenseRead, Staging, stored_tiles
from specontext.kv.transfers import Transfers


class Chunks:
    """Attention of the chunks of one batch.

    Attributes:
        reads: what each of them reads of earlier tokens in every layer, in the order in which `attend` does.
    """

    def __init__(self, batch: Batch, transfers: Transfers, methods: Methods, tile: int) -> None:
        self._batch, self._transfers, self._methods = batch, transfers, methods
        device = batch.seats.device
        self.reads = [DenseRead(torch.full((1,), segment.seat, device=device), segment.start, tile) for segment in batch.prefills]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor, staging: Staging | None
    ) -> None:
        """Store k and v of all chunks in a layer, and write their attention into the packed output [T, Hq, D].

        Args:
            query, key, value: of the whole batch.
            staging: earlier tokens of layers that are out of reach.
        """
        batch, chunks = self._batch, slice(self._batch.num_decodes, None)
        new = NewTokens(batch.seats[chunks], batch.positions[chunks], batch.lengths[chunks], key[chunks], value[chunks])
        self._transfers.append_chunk(layer, new)
        key, value = self._transfers.as_stored(key, value)
        for segment, read in zip(batch.prefills, self.reads, strict=True):
            part = slice(segment.offset, segment.offset + segment.length)
            output[part] = self._attend(layer, segment.seat, read, query[part], key[part], value[part], scale, staging)
            if (watcher := self._methods.watcher(segment.seat)) is not None:
                keys = partial(keys_up_to, self._transfers, layer, segment, key[part])
                watcher.observe_chunk(layer, segment, query[part], scale, keys)

    def _attend(
        self,
        layer: int,
        seat: int,
        read: DenseRead,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        staging: Staging | None,
    ) -> Tensor:
        if not read.stop:
            return causal_attention(query, key, value, scale)
        attention = ChunkAttention(query, key, value, scale)
        if self._transfers.in_reach(layer):
            for tile in stored_tiles(self._transfers, layer, seat, read.stop, read.tile):
                attention.add(tile)
        else:
            assert staging is not None
            for start, stop, rows in staging.tiles(layer, read):
                attention.add(rows.view(stop - start, key.shape[1], *rows.shape[1:]))
        return attention.result()
