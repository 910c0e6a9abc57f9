"""One step of the model seen from its attention layers: store KV, select, load, attend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specontext.core import Batch, Lane, Segment, Selection
from specontext.engine.methods import Methods
from specontext.engine.statistics import Meter
from specontext.kernels.attention_logits import attention_logits
from specontext.kernels.dense_attention import chunk_attention
from specontext.kernels.paged_attention import paged_attention
from specontext.kernels.sparse_attention import merge_partials, sparse_attention
from specontext.kv.dense import HostTiles, in_reach, pages_in_reach, read_tile, read_tokens, stored_tiles, tile_rows
from specontext.kv.reading import Reader, Reading
from specontext.kv.streams import COMPUTE, STATISTICS, Mark
from specontext.kv.tiered import TieredKV
from specontext.retrieval.selector import LaneTokens, Selector

# Sees a layer of a step: its number, the decode tokens, their true attention [R, Hq, S], and what each KV head reads [R, Hkv, B]
# (None for everything).
AttentionObserver = Callable[[int, LaneTokens, Tensor, Tensor | None], None]

# Shows the decode tokens of some ways of a batch, with full attention, to the methods that have to know it beforehand.
LookAhead = Callable[[Batch, Sequence["Way"]], None]

TILE = 1024  # tokens of one tile on a CPU
GPU_TILE = 16384  # a GPU is idle with small ones
LEAST_TILE = 256  # tokens of one request in a tile that many requests share


@dataclass(eq=False)
class Way:
    """The decode tokens start .. stop - 1 of a step, whose requests choose in the same way.

    Attributes:
        reading: what they read, of the last selection.
        tile: tokens of each that are streamed at once, where they read everything.
        seconds: that choosing took, all layers.
    """

    selector: Selector
    reader: Reader
    decode: LaneTokens
    part: slice
    tile: int
    reading: Reading | None = None
    seconds: float = field(default=0.0)


class Step:
    """Attention of one packed batch; it lives as long as one forward pass.

    Decode tokens read what their methods choose (everything, for a dense method); prompt chunks always attend densely.

    Args:
        observer: called for decode tokens in every layer, where recall is measured.
        look_ahead: called before methods select that foresee.
    """

    def __init__(
        self,
        batch: Batch,
        kv: TieredKV,
        methods: Methods,
        meter: Meter,
        *,
        measure_recall: bool,
        observer: AttentionObserver | None = None,
        look_ahead: LookAhead | None = None,
    ) -> None:
        self.batch, self.kv, self.methods, self.meter = batch, kv, methods, meter
        self.measure_recall, self.observer, self.look_ahead = measure_recall, observer, look_ahead
        self.tile = GPU_TILE if kv.streams.asynchronous else TILE
        lanes = batch.lanes or ((Lane(None, 0, batch.num_decodes, batch.span),) if batch.num_decodes else ())
        self.ways = [self._way(lane) for lane in lanes]
        # Choosing is timed where nothing runs beside it, or where measuring waits in any case.
        self._timed = measure_recall or not kv.streams.asynchronous
        self._counted: Mark = None
        self._streamed: HostTiles | None = None

    def _way(self, lane: Lane) -> Way:
        part = slice(lane.start, lane.stop)
        decode = LaneTokens.part(self.batch, part, lane.span)
        tile = max(self.tile // max(lane.stop - lane.start, 1), LEAST_TILE) if self.kv.streams.asynchronous else self.tile
        return Way(self.methods.of(lane.choice), self.methods.reader(lane.choice), decode, part, tile)

    def begin(self) -> None:
        """Select before the forward pass, where the method does, and start the loads of all offloaded layers."""
        self._foresee([way for way in self.ways if way.selector.foresees])
        for way in self.ways:
            if not way.selector.dense and not way.selector.in_layer:
                began = self._now()
                selection = way.selector.select(way.decode)
                way.seconds += self._now() - began
                way.reading = self.kv.begin_step(way.decode.seats, selection, reader=way.reader)
        if self.ways:
            self._count()
        reads = [way for way in self.ways if way.selector.dense]
        if (self.batch.prefills or reads) and not all(in_reach(self.kv, layer) for layer in range(self.kv.shape.layers)):
            tokens = max([self.tile, *(len(way.decode.seats) * way.tile for way in reads)])
            self._streamed = HostTiles(self.kv, self._streamed_tiles(), tokens * self.kv.shape.kv_heads)

    def _foresee(self, ways: Sequence[Way]) -> None:
        if not ways:
            return
        assert self.look_ahead is not None
        began = self._now()
        self.look_ahead(self.batch, ways)
        each = (self._now() - began) / sum(len(way.decode.seats) for way in ways)
        streamed = len(self.kv.offloaded) * self.kv.shape.kv_heads * self.kv.shape.row_bytes  # of a token
        for way in ways:
            way.seconds += each * len(way.decode.seats)
            self.meter.streamed(way.decode.seats, way.decode.lengths * streamed)

    def _now(self) -> float:
        if self._timed and self.kv.streams.asynchronous:
            torch.cuda.synchronize(self.kv.device)
        return time.perf_counter()

    def _count(self) -> None:
        """Statistics of the step, beside what is computed."""
        streams = self.kv.streams
        streams.wait(STATISTICS, streams.record(COMPUTE))
        with streams.on(STATISTICS):
            for way in self.ways:
                seats, lengths = way.decode.seats, way.decode.lengths
                if not way.selector.in_layer:
                    self.meter.step(seats, lengths, way.selector.selection_bytes(way.decode))
                if way.selector.dense:
                    self.meter.dense(seats, lengths, resident=sum(self.kv.resident))
                elif way.reading is not None:
                    self.meter.sparse(way.reading, self.kv.resident_flags)
        # This step holds the tensors until it has ended, and then compute has waited for the counting.
        self._counted = streams.record(STATISTICS)

    def end(self) -> None:
        """After the forward pass."""
        self.kv.streams.wait(COMPUTE, self._counted)
        for way in self.ways:
            if way.selector.in_layer:
                self.meter.step(way.decode.seats, way.decode.lengths, way.selector.selection_bytes(way.decode))
        if self._timed:
            for way in self.ways:
                self.meter.chosen(way.decode.seats, way.seconds / len(way.decode.seats))
        self.kv.end_step()

    def close(self) -> None:
        """Let go of everything: what has seen the step, such as a compiler, may keep it for a while, and not the engine too."""
        vars(self).clear()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `LayerAttention.attend`."""
        batch, kv, decodes = self.batch, self.kv, self.batch.num_decodes
        if not batch.prefills:
            kv.append(layer, batch.seats, batch.positions, key, value, batch.lengths)
            if len(self.ways) == 1:
                return self._decode(self.ways[0], layer, query, key, value, scale)
        output = torch.empty_like(query)
        if batch.prefills and decodes:
            new = (key[:decodes], value[:decodes])
            kv.append(layer, batch.seats[:decodes], batch.positions[:decodes], *new, batch.lengths[:decodes])
        for way in self.ways:
            output[way.part] = self._decode(way, layer, query[way.part], key[way.part], value[way.part], scale)
        if batch.prefills:
            self._attend_chunks(layer, query, key, value, scale, output)
        return output

    def _attend_chunks(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor) -> None:
        batch, chunks = self.batch, slice(self.batch.num_decodes, None)
        new = (key[chunks], value[chunks])
        self.kv.append_chunk(layer, batch.seats[chunks], batch.positions[chunks], *new, batch.lengths[chunks])
        for segment in batch.prefills:
            part = slice(segment.offset, segment.offset + segment.length)
            past = self._past(layer, segment)
            output[part] = chunk_attention(query[part], key[part], value[part], scale, past)
            watcher = self.methods.watcher(segment.seat)
            if watcher is not None:
                watcher.observe_chunk(layer, segment, query[part], scale, _ChunkKeys(self.kv, layer, segment, key[part]))

    # Decode -----------------------------------------------------------------------------------------------------------

    def _decode(self, way: Way, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if way.selector.dense:
            if self.measure_recall:
                self.meter.recall(layer, way.decode.seats, torch.ones_like(way.decode.seats, dtype=torch.float64))
                if self.observer is not None:
                    self.observer(layer, way.decode, self._true_weights(way, layer, query, scale), None)
            return self._decode_dense(way, layer, query, key, value, scale)
        if way.selector.in_layer:
            self._select_in_layer(way, _View(self, way, layer, query, key, scale), layer)
        assert way.reading is not None
        if self.measure_recall:
            self._measure(way, layer, query, scale, way.reading.selection)
        self.kv.wait(layer)
        return sparse_attention(query, self.kv.arena.rows, self.kv.rows(layer, way.reading), scale)[0]

    def _select_in_layer(self, way: Way, view: _View, layer: int) -> None:
        seats = way.decode.seats
        began = self._now()
        selection = way.selector.select_in_layer(layer, way.decode, view)
        way.seconds += self._now() - began
        if not self.kv.resident[layer] and view.tokens_read is not None:  # the keys it looked at were streamed in
            self.meter.streamed(seats, view.tokens_read * (self.kv.shape.kv_heads * self.kv.shape.row_bytes // 2))
        way.reading = self.kv.begin_step(seats, selection, layer, way.reader)
        self.meter.sparse(way.reading, self.kv.resident_flags, layer)

    def _decode_dense(self, way: Way, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        kv, seats, lengths = self.kv, way.decode.seats, way.decode.lengths
        if in_reach(kv, layer):
            rows, pages = pages_in_reach(kv, layer, seats)
            heads, size = kv.shape.kv_heads, kv.page_size
            return paged_attention(query, rows, pages, lengths, scale, page_size=size, kv_heads=heads, tile=self.tile)[0]
        # The token itself is on its way to the host, and stands beside the tiles.
        own = torch.stack((key, value), dim=2).view(-1, 2, key.shape[2])
        place = torch.arange(len(own), device=own.device).view(*key.shape[:2], 1)
        parts = [sparse_attention(query, own, place, scale)]
        assert self._streamed is not None
        for start, stop in _tiles(way.decode.span - 1, way.tile):
            buffer = self._streamed.take()
            rows = torch.arange(len(buffer), device=buffer.device).view(*key.shape[:2], -1)
            absent = start + torch.arange(stop - start, device=buffer.device) >= way.decode.positions[:, None]
            parts.append(sparse_attention(query, buffer, rows.masked_fill(absent[:, None], -1), scale))
        outputs, lses = zip(*parts, strict=True)
        return merge_partials(torch.stack(outputs), torch.stack(lses))

    def true_logits(self, decode: LaneTokens, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention logits over the whole context of some decode tokens, float32 [R, Hq, S]."""
        parts = []
        for start, stop in _tiles(decode.span, self.tile):
            buffer, rows = read_tile(self.kv, layer, decode.seats, start, stop, decode.lengths)
            parts.append(attention_logits(query, buffer, rows, scale))
        return torch.cat(parts, dim=-1)

    def _measure(self, way: Way, layer: int, query: Tensor, scale: float, selection: Selection) -> None:
        weights = self._true_weights(way, layer, query, scale)
        tokens = selection.tokens[:, way.reader.head_map[layer]]  # [R, Hkv, B]
        if self.observer is not None:
            self.observer(layer, way.decode, weights, tokens)
        tokens = tokens.repeat_interleave(query.shape[1] // tokens.shape[1], dim=1)
        covered = torch.where(tokens >= 0, weights.gather(-1, tokens.clamp(min=0)), 0.0).sum(-1)
        self.meter.recall(layer, way.decode.seats, covered.mean(-1))

    def _true_weights(self, way: Way, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention over the whole context, float32 [R, Hq, S]."""
        return torch.softmax(self.true_logits(way.decode, layer, query, scale), dim=-1)

    # Dense reading ----------------------------------------------------------------------------------------------------

    def _past(self, layer: int, segment: Segment) -> Iterator[Tensor]:
        """K and V of the tokens stored before a chunk, in tiles [T, Hkv, 2, D]."""
        if in_reach(self.kv, layer):
            yield from stored_tiles(self.kv, layer, segment.seat, segment.start, self.tile)
            return
        for start, stop in _tiles(segment.start, self.tile):
            assert self._streamed is not None
            yield self._streamed.take().view(stop - start, self.kv.shape.kv_heads, 2, -1)

    def _streamed_tiles(self) -> Iterator[Tensor]:
        """Host rows of every tile that this step reads densely, in the order in which `attend` takes them."""
        kv = self.kv
        for layer in range(kv.shape.layers):
            if in_reach(kv, layer):
                continue
            for way in self.ways:
                if way.selector.dense:
                    for start, stop in _tiles(way.decode.span - 1, way.tile):
                        yield tile_rows(kv, layer, way.decode.seats, start, stop, way.decode.positions)
            for segment in self.batch.prefills:
                seat = torch.tensor([segment.seat], device=kv.device)
                for start, stop in _tiles(segment.start, self.tile):
                    yield tile_rows(kv, layer, seat, start, stop).transpose(1, 2)  # token by token, as chunks read them


class _View:
    """A layer as a method sees it that selects inside it; see `LayerView`.

    Attributes:
        tokens_read: int64 [R], tokens whose keys it has looked at, None for none.
    """

    def __init__(self, step: Step, way: Way, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        self.query, self.key, self.scale = query, key, scale
        self._step, self._way, self._layer = step, way, layer
        self.tokens_read: Tensor | None = None

    def logits(self) -> Tensor:
        decode = self._way.decode
        self._read(decode.lengths)
        return self._step.true_logits(decode, self._layer, self.query, self.scale)

    def logits_of(self, tokens: Tensor) -> Tensor:
        buffer, rows = read_tokens(self._step.kv, self._layer, self._way.decode.seats, tokens)
        return attention_logits(self.query, buffer, rows, self.scale)

    def keys(self, row: int, start: int, stop: int) -> Tensor:
        decode = self._way.decode
        counts = torch.zeros_like(decode.positions)
        counts[row] = stop - start
        self._read(counts)
        return _keys(self._step.kv, self._layer, decode.seats[row : row + 1], start, stop)

    def _read(self, counts: Tensor) -> None:
        self.tokens_read = counts if self.tokens_read is None else self.tokens_read + counts


@dataclass(frozen=True, eq=False)
class _ChunkKeys:
    """Gives the keys of a prompt in a layer, up to the end of a chunk [start + T, Hkv, D]."""

    kv: TieredKV
    layer: int
    segment: Segment
    new: Tensor

    def __call__(self) -> Tensor:
        if not self.segment.start:
            return self.new
        seat = torch.tensor([self.segment.seat], device=self.new.device)
        # A chunk's own rows may still be on their way to the host.
        return torch.cat((_keys(self.kv, self.layer, seat, 0, self.segment.start), self.new))


def _keys(kv: TieredKV, layer: int, seat: Tensor, start: int, stop: int) -> Tensor:
    """Keys of the tokens start .. stop - 1 of one request: [stop - start, Hkv, D]."""
    buffer, rows = read_tile(kv, layer, seat, start, stop, torch.full_like(seat, stop))
    return buffer[rows[0].T, 0]


def _tiles(stop: int, tile: int) -> Iterator[tuple[int, int]]:
    for start in range(0, stop, tile):
        yield start, min(start + tile, stop)
