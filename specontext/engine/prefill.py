"""The prompt chunks of a step: they attend densely to what is stored, in long tiles, and causally to themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from specontext.core import Batch, Segment
from specontext.engine.methods import Methods
from specontext.engine.true_attention import keys_up_to
from specontext.kernels.dense_attention import causal_attention, chunk_attention
from specontext.kernels.dispatch import upload
from specontext.kernels.gpu_chunk import QUERIES, packed_attention, serves
from specontext.kernels.latents import Latents
from specontext.kernels.quantised_rows import dequantised
from specontext.kernels.softmax import PLAIN, Softmax
from specontext.kernels.tables import NewTokens, is_quantised
from specontext.kv.dense import stored_tiles
from specontext.kv.staging import DenseRead, Staging
from specontext.kv.transfers import Transfers
from specontext.memory.model import made_tile


@dataclass(frozen=True, eq=False)
class _Together:
    """Chunks that are next to each other in a batch and attend in one call: short ones that begin their prompts.

    Attributes:
        bounds: int32 [N + 1] on the device, where each begins, and where the last one ends.
        longest: tokens of the longest.
    """

    segments: tuple[Segment, ...]
    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> _Together:
        lengths = [segment.length for segment in segments]
        bounds = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
        return cls(tuple(segments), upload(bounds, torch.int32, device), max(lengths))


class Chunks:
    """Attention of the chunks of one batch.

    Args:
        tile: stored tokens that are read at once.

    Attributes:
        reads: what each of them reads of earlier tokens in every layer, in the order in which `attend` does.
    """

    def __init__(self, batch: Batch, transfers: Transfers, methods: Methods, tile: int) -> None:
        self._batch, self._transfers, self._methods = batch, transfers, methods
        device = batch.seats.device
        self.reads = [DenseRead(torch.full((1,), segment.seat, device=device), segment.start, tile) for segment in batch.prefills]
        alone = [not _short_beginning(segment) for segment in batch.prefills]
        runs = groupby(zip(batch.prefills, alone, strict=True), key=lambda pair: pair[1])
        kept = [[segment for segment, _ in members] for by_itself, members in runs if not by_itself]
        self._together = {run[0].offset: _Together.of(run, device) for run in kept if len(run) > 1}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        output: Tensor,
        staging: Staging | None,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> None:
        """Store k and v of all chunks in a layer, unless they are `stored` already, and write their attention into the packed
        output [T, Hq, D].

        Args:
            query, key, value: of the whole batch.
            staging: earlier tokens of layers that are out of reach.
        """
        batch, chunks = self._batch, slice(self._batch.num_decodes, None)
        if not stored:
            new = NewTokens(batch.seats[chunks], batch.positions[chunks], batch.lengths[chunks], key[chunks], value[chunks])
            self._transfers.append_chunk(layer, new)
        key, value = self._transfers.as_stored(layer, key, value)
        done = 0
        for segment, read in zip(batch.prefills, self.reads, strict=True):
            part = slice(segment.offset, segment.offset + segment.length)
            if segment.offset >= done:
                done = self._write(layer, segment, read, query, key, value, scale, output, staging, softmax)
            if not stored and (watcher := self._methods.watcher(segment.seat)) is not None:
                keys = partial(keys_up_to, self._transfers, layer, segment, key[part])
                watcher.observe_chunk(layer, segment, query[part], scale, keys)

    def attend_latents(
        self,
        layer: int,
        latents: Latents,
        query: Tensor,
        row: Tensor,
        scale: float,
        output: Tensor,
        staging: Staging | None,
        softmax: Softmax = PLAIN,
    ) -> None:
        """The same of rows of latents [T, 1, rank + rotated], queries [T, Hq, nope + rotated] and outputs [T, Hq, V].

        A long chunk makes keys and values of stored rows, as many at a time as `made_tile` says; a short one attends to rows.
        """
        batch, chunks = self._batch, slice(self._batch.num_decodes, None)
        new = NewTokens(batch.seats[chunks], batch.positions[chunks], batch.lengths[chunks], row[chunks], row[chunks])
        self._transfers.append_chunk(layer, new)
        row, _ = self._transfers.as_stored(layer, row, row)
        for segment, read in zip(batch.prefills, self.reads, strict=True):
            part = slice(segment.offset, segment.offset + segment.length)
            own, rows = query[part], row[part]
            makes = not read.stop or latents.making_pays(segment.length, row.shape[2])
            absorb = partial(self._attend_to_rows, layer, segment, read, rows, scale, staging, softmax)
            if makes:
                output[part] = self._attend_to_made(layer, segment, read, latents, own, rows, scale, staging, softmax)
            else:
                output[part] = latents.attention(own, absorb)
            if (watcher := self._methods.watcher(segment.seat)) is not None:
                keys = partial(keys_up_to, self._transfers, layer, segment, rows)
                watcher.observe_chunk(layer, segment, latents.absorbed(own), scale, keys)

    def _attend_to_rows(
        self,
        layer: int,
        segment: Segment,
        read: DenseRead,
        rows: Tensor,
        scale: float,
        staging: Staging | None,
        softmax: Softmax,
        query: Tensor,
    ) -> Tensor:
        attention = chunk_attention(query, rows, rows, scale, softmax)
        for tile in self._tiles(layer, segment, read, staging):
            attention.add(_latents(tile, rows))
        return attention.result()

    def _attend_to_made(
        self,
        layer: int,
        segment: Segment,
        read: DenseRead,
        latents: Latents,
        query: Tensor,
        rows: Tensor,
        scale: float,
        staging: Staging | None,
        softmax: Softmax,
    ) -> Tensor:
        key, value = latents.made(rows).unbind(2)
        attention = chunk_attention(query, key, value, scale, softmax)
        most = made_tile(query.shape[1], query.shape[2], query.dtype.itemsize)
        for tile in self._tiles(layer, segment, read, staging):
            for some in tile.split(most):
                attention.add(latents.made(_latents(some, rows)))
        return attention.result()[..., : latents.value.shape[1]]

    def _tiles(self, layer: int, segment: Segment, read: DenseRead, staging: Staging | None) -> Iterator[Tensor]:
        """The rows [T, Hkv, *row] of the tokens before a chunk."""
        if self._transfers.in_reach(layer):
            yield from stored_tiles(self._transfers, layer, segment.seat, read.stop, read.tile)
        elif read.stop:
            assert staging is not None
            for staged in staging.tiles(layer, read):
                yield staged.tokens[0]

    def _write(
        self,
        layer: int,
        segment: Segment,
        read: DenseRead,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        output: Tensor,
        staging: Staging | None,
        softmax: Softmax,
    ) -> int:
        """Attention of a chunk, and of those that go with it; the place in the batch up to which it is there."""
        together = self._together.get(segment.offset) if serves(query) and softmax.plain else None
        last = together.segments[-1] if together is not None else segment
        part = slice(segment.offset, last.offset + last.length)
        numbers = query[part], key[part], value[part]
        if together is not None:
            output[part] = packed_attention(*numbers, together.bounds, together.longest, scale)
        elif not read.stop:
            output[part] = causal_attention(*numbers, scale, softmax)
        else:
            attention = chunk_attention(*numbers, scale, softmax)
            for tile in self._tiles(layer, segment, read, staging):
                attention.add(tile)
            output[part] = attention.result()
        return part.stop


def _latents(tile: Tensor, like: Tensor) -> Tensor:
    """Stored latents [T, 1, 1, D], dequantised to the number format of others where they are in 8 bits."""
    return dequantised(tile, like[:, :, None]) if is_quantised(tile) else tile


def _short_beginning(segment: Segment) -> bool:
    return not segment.start and segment.length < QUERIES
