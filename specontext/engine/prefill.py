"""The prompt chunks of a step: they attend densely to what is stored, in long tiles, and causally to themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from specontext.core import Batch, Segment
from specontext.engine.layer_call import LayerCall
from specontext.engine.methods import Methods
from specontext.engine.true_attention import keys_up_to
from specontext.kernels.dense_attention import causal_attention, chunk_attention
from specontext.kernels.dispatch import upload
from specontext.kernels.gpu_chunk import QUERIES, packed_attention, serves
from specontext.kernels.latents import Latents
from specontext.kernels.quantised_rows import dequantised
from specontext.kernels.tables import NewTokens, is_quantised
from specontext.kv.dense import stored_tiles
from specontext.kv.staging import DenseRead, Staging
from specontext.kv.transfers import Transfers
from specontext.memory.tiles import made_tile


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

    def attend(self, call: LayerCall, output: Tensor, staging: Staging | None) -> None:
        """Store k and v of all chunks in a layer, unless they are stored already, and write their attention into the packed
        output [T, Hq, D].

        Args:
            call: of the whole batch.
            staging: earlier tokens of layers that are out of reach.
        """
        if not call.stored:
            self._append(call)
        key, value = self._transfers.as_stored(call.layer, call.key, call.value)
        call, done = replace(call, key=key, value=value), 0
        for segment, read in zip(self._batch.prefills, self.reads, strict=True):
            if segment.offset >= done:
                done = self._write(segment, read, call, output, staging)
            if not call.stored and (watcher := self._methods.watcher(segment.seat)) is not None:
                own = call.of(_part(segment))
                keys = partial(keys_up_to, self._transfers, call.layer, segment, own.key)
                watcher.observe_chunk(call.layer, segment, own.query, call.scale, keys)

    def attend_latents(self, latents: Latents, call: LayerCall, output: Tensor, staging: Staging | None) -> None:
        """The same of rows of latents [T, 1, rank + rotated], queries [T, Hq, nope + rotated] and outputs [T, Hq, V].

        A long chunk makes keys and values of stored rows, as many at a time as `made_tile` says; a short one attends to rows.
        """
        self._append(call)
        row, _ = self._transfers.as_stored(call.layer, call.key, call.value)
        call = replace(call, key=row, value=row)
        for segment, read in zip(self._batch.prefills, self.reads, strict=True):
            own = call.of(_part(segment))
            tiles = self._tiles(call.layer, segment, read, staging)
            if not read.stop or latents.making_pays(segment.length, row.shape[2]):
                output[_part(segment)] = _attend_to_made(latents, own, tiles)
            else:
                output[_part(segment)] = latents.attention(own.query, partial(_attend_to_rows, own, tiles))
            if (watcher := self._methods.watcher(segment.seat)) is not None:
                keys = partial(keys_up_to, self._transfers, call.layer, segment, own.key)
                watcher.observe_chunk(call.layer, segment, latents.absorbed(own.query), call.scale, keys)

    def _append(self, call: LayerCall) -> None:
        """Store k and v of all chunks."""
        batch, chunks = self._batch, slice(self._batch.num_decodes, None)
        place = batch.seats[chunks], batch.positions[chunks], batch.lengths[chunks]
        self._transfers.append_chunk(call.layer, NewTokens(*place, call.key[chunks], call.value[chunks]))

    def _tiles(self, layer: int, segment: Segment, read: DenseRead, staging: Staging | None) -> Iterator[Tensor]:
        """The rows [T, Hkv, *row] of the tokens before a chunk."""
        if self._transfers.in_reach(layer):
            yield from stored_tiles(self._transfers, layer, segment.seat, read.stop, read.tile)
        elif read.stop:
            assert staging is not None
            for staged in staging.tiles(layer, read):
                yield staged.tokens[0]

    def _write(self, segment: Segment, read: DenseRead, call: LayerCall, output: Tensor, staging: Staging | None) -> int:
        """Attention of a chunk, and of those that go with it; the place in the batch up to which it is there."""
        together = self._together.get(segment.offset) if serves(call.query) and call.softmax.plain else None
        last = together.segments[-1] if together is not None else segment
        part = slice(segment.offset, last.offset + last.length)
        own = call.of(part)
        numbers = own.query, own.key, own.value
        if together is not None:
            output[part] = packed_attention(*numbers, together.bounds, together.longest, call.scale)
        elif not read.stop:
            output[part] = causal_attention(*numbers, call.scale, call.softmax)
        else:
            attention = chunk_attention(*numbers, call.scale, call.softmax)
            for tile in self._tiles(call.layer, segment, read, staging):
                attention.add(tile)
            output[part] = attention.result()
        return part.stop


def _attend_to_rows(own: LayerCall, tiles: Iterable[Tensor], absorbed: Tensor) -> Tensor:
    """Attention of a chunk whose queries are in latent space."""
    attention = chunk_attention(absorbed, own.key, own.key, own.scale, own.softmax)
    for tile in tiles:
        attention.add(_latents(tile, own.key))
    return attention.result()


def _attend_to_made(latents: Latents, own: LayerCall, tiles: Iterable[Tensor]) -> Tensor:
    """Attention of a chunk to keys and values that are made of rows."""
    query, (key, value) = own.query, latents.made(own.key).unbind(2)
    attention = chunk_attention(query, key, value, own.scale, own.softmax)
    most = made_tile(query.shape[1], query.shape[2], query.dtype.itemsize)
    for tile in tiles:
        for some in tile.split(most):
            attention.add(latents.made(_latents(some, own.key)))
    return attention.result()[..., : latents.value.shape[1]]


def _part(segment: Segment) -> slice:
    """Where a chunk stands in its batch."""
    return slice(segment.offset, segment.offset + segment.length)


def _latents(tile: Tensor, like: Tensor) -> Tensor:
    """Stored latents [T, 1, 1, D], dequantised to the number format of others where they are in 8 bits."""
    return dequantised(tile, like[:, :, None]) if is_quantised(tile) else tile


def _short_beginning(segment: Segment) -> bool:
    return not segment.start and segment.length < QUERIES
