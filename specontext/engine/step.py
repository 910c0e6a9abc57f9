"""One step of the model seen from its attention layers: store KV, select, load, attend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specontext.core import Batch, LoadPlan, Segment, Selection
from specontext.engine.statistics import Meter
from specontext.kernels.attention_logits import attention_logits
from specontext.kernels.dense_attention import chunk_attention
from specontext.kernels.paged_attention import paged_attention
from specontext.kernels.sparse_attention import merge_partials, sparse_attention
from specontext.kv.dense import HostTiles, in_reach, pages_in_reach, read_tile, stored_tiles, tile_rows
from specontext.kv.streams import COMPUTE, STATISTICS, Mark
from specontext.kv.tiered import TieredKV
from specontext.retrieval.selector import DecodeTokens, Selector

TILE = 1024  # tokens of one tile on a CPU
GPU_TILE = 16384  # a GPU is idle with small ones


class Step:
    """Attention of one packed batch; it lives as long as one forward pass.

    Decode tokens read what the selector chose (everything, for a dense method); prompt chunks always attend densely.
    """

    def __init__(self, batch: Batch, kv: TieredKV, selector: Selector, meter: Meter, *, measure_recall: bool) -> None:
        self.batch, self.kv, self.selector, self.meter = batch, kv, selector, meter
        self.measure_recall = measure_recall
        self.decode = DecodeTokens.of(batch)
        self.tile = GPU_TILE if kv.streams.asynchronous else TILE
        self.selection: Selection | None = None
        self._plan: LoadPlan | None = None
        self._counted: Mark = None
        self._streamed: HostTiles | None = None

    def begin(self) -> None:
        """Select before the forward pass, where the method does, and start the loads of all offloaded layers."""
        if self.batch.num_decodes:
            if not self.selector.dense and not self.selector.in_layer:
                self.selection = self.selector.select(self.decode)
                self._plan = self.kv.begin_step(self.decode.seats, self.selection)
            self._count()
        dense = self.batch.prefills or (self.selector.dense and self.batch.num_decodes)
        if dense and not all(in_reach(self.kv, layer) for layer in range(self.kv.shape.layers)):
            most = max(self.batch.num_decodes if self.selector.dense else 0, 1) * self.tile * self.kv.shape.kv_heads
            self._streamed = HostTiles(self.kv, self._streamed_tiles(), most)

    def _count(self) -> None:
        """Statistics of the step, beside what is computed."""
        seats, lengths, streams = self.decode.seats, self.decode.lengths, self.kv.streams
        streams.wait(STATISTICS, streams.record(COMPUTE))
        with streams.on(STATISTICS):
            self.meter.step(seats, lengths, self.selector.selection_bytes(lengths))
            if self.selector.dense:
                self.meter.dense(seats, lengths, resident=sum(self.kv.resident))
            elif self.selection is not None:
                self.meter.sparse(seats, self.selection, self._plan, self.kv.resident_flags)
        # This step holds the tensors until it has ended, and then compute has waited for the counting.
        self._counted = streams.record(STATISTICS)

    def end(self) -> None:
        """After the forward pass."""
        self.kv.streams.wait(COMPUTE, self._counted)
        self.kv.end_step()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `LayerAttention.attend`."""
        batch, kv, decodes = self.batch, self.kv, self.batch.num_decodes
        if not batch.prefills:
            kv.append(layer, batch.seats, batch.positions, key, value, batch.lengths)
            return self._decode(layer, query, key, value, scale)
        output = torch.empty_like(query)
        if decodes:
            new = (key[:decodes], value[:decodes])
            kv.append(layer, batch.seats[:decodes], batch.positions[:decodes], *new, batch.lengths[:decodes])
            output[:decodes] = self._decode(layer, query[:decodes], *new, scale)
        new = (key[decodes:], value[decodes:])
        kv.append_chunk(layer, batch.seats[decodes:], batch.positions[decodes:], *new, batch.lengths[decodes:])
        for segment in batch.prefills:
            part = slice(segment.offset, segment.offset + segment.length)
            past = self._past(layer, segment)
            output[part] = chunk_attention(query[part], key[part], value[part], scale, past)
        return output

    # Decode -----------------------------------------------------------------------------------------------------------

    def _decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.selector.dense:
            if self.measure_recall:
                self.meter.recall(self.decode.seats, torch.ones_like(self.decode.seats, dtype=torch.float64))
            return self._decode_dense(layer, query, key, value, scale)
        selection = self._selection_of(layer, query, scale)
        if self.measure_recall:
            self._measure(layer, query, scale, selection)
        self.kv.wait(layer)
        rows = self.kv.rows(layer, self.decode.seats, selection, in_layer=self.selector.in_layer)
        return sparse_attention(query, self.kv.arena.rows, rows, scale)[0]

    def _selection_of(self, layer: int, query: Tensor, scale: float) -> Selection:
        if not self.selector.in_layer:
            assert self.selection is not None
            return self.selection
        seats, lengths = self.decode.seats, self.decode.lengths
        selection = self.selector.select_in_layer(layer, self.decode, lambda: self._true_logits(layer, query, scale))
        if not self.kv.resident[layer]:  # the keys it looked at were streamed in
            self.meter.streamed(seats, lengths * (self.kv.shape.kv_heads * self.kv.shape.row_bytes // 2))
        plan = self.kv.begin_step(seats, selection, layer)
        self.meter.sparse(seats, selection, plan, self.kv.resident_flags, layer)
        return selection

    def _decode_dense(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        kv, seats, lengths = self.kv, self.decode.seats, self.decode.lengths
        if in_reach(kv, layer):
            rows, pages = pages_in_reach(kv, layer, seats)
            heads, size = kv.shape.kv_heads, kv.page_size
            return paged_attention(query, rows, pages, lengths, scale, page_size=size, kv_heads=heads, tile=self.tile)[0]
        # The token itself is on its way to the host, and stands beside the tiles.
        own = torch.stack((key, value), dim=2).view(-1, 2, key.shape[2])
        place = torch.arange(len(own), device=own.device).view(*key.shape[:2], 1)
        parts = [sparse_attention(query, own, place, scale)]
        assert self._streamed is not None
        for start, stop in self._tiles_before(self.batch.span - 1):
            buffer = self._streamed.take()
            rows = torch.arange(len(buffer), device=buffer.device).view(*key.shape[:2], -1)
            absent = start + torch.arange(stop - start, device=buffer.device) >= self.decode.positions[:, None]
            parts.append(sparse_attention(query, buffer, rows.masked_fill(absent[:, None], -1), scale))
        outputs, lses = zip(*parts, strict=True)
        return merge_partials(torch.stack(outputs), torch.stack(lses))

    def _true_logits(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Logits over the whole context, float32 [R, Hq, S]."""
        parts = []
        for start, stop in self._tiles_before(self.batch.span):
            buffer, rows = read_tile(self.kv, layer, self.decode.seats, start, stop, self.decode.lengths)
            parts.append(attention_logits(query, buffer, rows, scale))
        return torch.cat(parts, dim=-1)

    def _measure(self, layer: int, query: Tensor, scale: float, selection: Selection) -> None:
        weights = torch.softmax(self._true_logits(layer, query, scale), dim=-1)  # [R, Hq, S]
        tokens = selection.tokens[:, self.kv.head_map[layer]]  # [R, Hkv, B]
        tokens = tokens.repeat_interleave(query.shape[1] // tokens.shape[1], dim=1)
        covered = torch.where(tokens >= 0, weights.gather(-1, tokens.clamp(min=0)), 0.0).sum(-1)
        self.meter.recall(self.decode.seats, covered.mean(-1))

    # Dense reading ----------------------------------------------------------------------------------------------------

    def _tiles_before(self, stop: int) -> Iterator[tuple[int, int]]:
        for start in range(0, stop, self.tile):
            yield start, min(start + self.tile, stop)

    def _past(self, layer: int, segment: Segment) -> Iterator[Tensor]:
        """K and V of the tokens stored before a chunk, in tiles [T, Hkv, 2, D]."""
        if in_reach(self.kv, layer):
            yield from stored_tiles(self.kv, layer, segment.seat, segment.start, self.tile)
            return
        for start, stop in self._tiles_before(segment.start):
            assert self._streamed is not None
            yield self._streamed.take().view(stop - start, self.kv.shape.kv_heads, 2, -1)

    def _streamed_tiles(self) -> Iterator[Tensor]:
        """Host rows of every tile that this step reads densely, in the order in which `attend` takes them."""
        kv = self.kv
        for layer in range(kv.shape.layers):
            if in_reach(kv, layer):
                continue
            if self.selector.dense and self.batch.num_decodes:
                for start, stop in self._tiles_before(self.batch.span - 1):
                    yield tile_rows(kv, layer, self.decode.seats, start, stop, self.decode.positions)
            for segment in self.batch.prefills:
                seat = torch.tensor([segment.seat], device=kv.device)
                for start, stop in self._tiles_before(segment.start):
                    yield tile_rows(kv, layer, seat, start, stop).transpose(1, 2)  # token by token, as chunks read them
