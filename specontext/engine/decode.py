"""One step of the model seen from its attention layers: decode tokens store KV, choose, load and attend. Prompt chunks are
`prefill.py`'s."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from specontext.core import Batch, Lane
from specontext.engine.methods import Methods
from specontext.engine.prefill import Chunks
from specontext.engine.states import StatefulStep
from specontext.engine.statistics import Meter
from specontext.engine.true_attention import AttentionObserver, View, covered, true_logits
from specontext.engine.windows import WindowedStep
from specontext.kernels.latents import Latents
from specontext.kernels.paged_attention import paged_attention
from specontext.kernels.softmax import PLAIN, Softmax, with_sinks
from specontext.kernels.spans import vectors_in
from specontext.kernels.sparse_attention import merge_partials, sparse_attention
from specontext.kernels.tables import NewTokens
from specontext.kv.cache import KVCache
from specontext.kv.layout import PlacedSelection, Reader
from specontext.kv.staging import DenseRead, Staging
from specontext.kv.streams import STATISTICS, Mark
from specontext.layer_sizes import Window
from specontext.memory.model import DECODE_TILE, LEAST_TILE, prompt_tile
from specontext.models.mixers import MixerCall
from specontext.retrieval.selector import AheadSelector, ForeseeingSelector, LaneTokens, LayerSelector, Selector

# Shows the decode tokens of some lanes of a batch, with full attention, to the methods that have to know it beforehand.
LookAhead = Callable[[Batch, Sequence["RunningLane"]], None]

TILE = 1024  # tokens of one tile on a CPU


@dataclass(eq=False)
class RunningLane:
    """Decode tokens of a step whose requests choose in the same way: ahead of it, in each layer, or not at all.

    Attributes:
        ahead, in_layer: the selector, where it is of this kind; both are None where everything is read.
        part: where they stand in the batch.
        read: the stored tokens, where everything is read; else None.
        reading: what they read, of the last selection.
        rows: arena rows of `reading` for every layer, integers [L, R, Hkv, B], where they are made for all layers at once.
        seconds: that choosing took, all layers.
        chosen: what a layer has chosen whose KV others read too.
    """

    selector: Selector
    ahead: AheadSelector | None
    in_layer: LayerSelector | None
    reader: Reader
    decode: LaneTokens
    part: slice
    read: DenseRead | None
    reading: PlacedSelection | None = None
    rows: Tensor | None = None
    seconds: float = 0.0
    chosen: dict[int, PlacedSelection] = field(default_factory=dict)


class Step:
    """Attention of one packed batch. It lives as long as one forward pass, and whoever makes it empties it then, with
    `vars(step).clear()`: what has seen it, such as a compiler, may keep it for a while, and not the engine too.

    Decode tokens read what their methods choose (everything, for a dense method); prompt chunks always attend densely.

    Args:
        observer: called for decode tokens in every layer, where recall is measured.
        look_ahead: called before methods select that foresee.
        keep_states: see `StatefulStep`.
    """

    def __init__(
        self,
        batch: Batch,
        kv: KVCache,
        methods: Methods,
        meter: Meter,
        *,
        measure_recall: bool,
        observer: AttentionObserver | None = None,
        look_ahead: LookAhead | None = None,
        keep_states: bool = True,
    ) -> None:
        self.batch, self.kv, self.transfers, self.methods, self.meter = batch, kv, kv.transfers, methods, meter
        self.measure_recall, self.observer, self.look_ahead = measure_recall, observer, look_ahead
        self.tile = DECODE_TILE if self.transfers.asynchronous else TILE
        self.lanes = [self._lane(lane) for lane in batch.lanes]
        self.chunks = Chunks(batch, self.transfers, methods, self._prompt_tile) if batch.prefills else None
        self.windowed = WindowedStep(batch, kv.rings) if kv.rings is not None else None
        self.stateful = StatefulStep(batch, kv.states, keep=keep_states) if kv.states is not None else None
        self.staging: Staging | None = None
        self._counted: Mark = None
        # Choosing is timed where nothing runs beside it, or where measuring waits in any case.
        self._timed = measure_recall or not self.transfers.asynchronous
        self._now = partial(_synchronised, kv.device) if self._timed and self.transfers.asynchronous else time.perf_counter

    def _lane(self, lane: Lane) -> RunningLane:
        part = slice(lane.start, lane.stop)
        selector, reader = self.methods.own_way if lane.choice is None else self.methods.way(lane.choice)
        decode = LaneTokens.part(self.batch, part, lane.span)
        ahead = selector if isinstance(selector, AheadSelector) else None
        in_layer = selector if isinstance(selector, LayerSelector) else None
        read = None
        if ahead is None and in_layer is None:
            shared = max(self.tile // (lane.stop - lane.start), LEAST_TILE) if self.transfers.asynchronous else self.tile
            read = DenseRead(decode.seats, lane.span - 1, shared, decode.positions)
        return RunningLane(
            selector,
            ahead,
            in_layer,
            reader,
            decode,
            part,
            read,
        )

    @property
    def _prompt_tile(self) -> int:
        """Stored tokens that a chunk reads at once."""
        return prompt_tile(self.kv.layout.layers[0].entry_bytes) if self.transfers.asynchronous else TILE

    def begin(self) -> None:
        """Select before the forward pass, where the method does, and start the loads of all offloaded layers."""
        if self.look_ahead is not None:
            self._foresee(self.look_ahead)
        for lane in self.lanes:
            if lane.ahead is not None:
                began = self._now()
                selection = lane.ahead.select(lane.decode)
                lane.seconds += self._now() - began
                lane.reading = self.kv.read(lane.decode.seats, selection, reader=lane.reader)
        if self.lanes:
            self._count()
        reads = [lane.read for lane in self.lanes if lane.read is not None] + (
            self.chunks.reads if self.chunks is not None else []
        )
        if reads and self.transfers.asynchronous:
            self.staging = Staging(self.transfers, reads, self.kv.read_order)

    def _foresee(self, look_ahead: LookAhead) -> None:
        lanes = [lane for lane in self.lanes if isinstance(lane.selector, ForeseeingSelector)]
        if not lanes:
            return
        began = self._now()
        look_ahead(self.batch, lanes)
        each = (self._now() - began) / sum(len(lane.decode.seats) for lane in lanes)
        streamed = sum(self.kv.host.layout.layers[layer].entry_bytes for layer in self.kv.offloaded)  # of a token
        for lane in lanes:
            lane.seconds += each * len(lane.decode.seats)
            self.meter.streamed(lane.decode.seats, lane.decode.lengths * streamed)

    def _count(self) -> None:
        """Statistics of the step, beside what is computed; it holds their tensors until compute has waited for them."""
        with self.transfers.beside(STATISTICS):
            for lane in self.lanes:
                seats, lengths = lane.decode.seats, lane.decode.lengths
                if lane.in_layer is None:
                    self.meter.decoded(seats, lengths, lane.selector.selection_bytes(lane.decode))
                if lane.reading is not None:
                    self.meter.sparse(lane.reading, self.transfers.tiers.resident)
                elif lane.read is not None:
                    self.meter.dense(seats, lengths, resident=sum(self.transfers.resident))
        self._counted = self.transfers.mark(STATISTICS)

    def end(self) -> None:
        """After the forward pass."""
        self.transfers.after(self._counted)
        self.transfers.end_step()
        for lane in self.lanes:
            if lane.in_layer is not None:
                self.meter.decoded(lane.decode.seats, lane.decode.lengths, lane.selector.selection_bytes(lane.decode))
            if self._timed:
                self.meter.chosen(lane.decode.seats, lane.seconds / len(lane.decode.seats))

    @property
    def positions(self) -> Tensor:
        return self.batch.positions

    def attend_window(
        self,
        layer: int,
        window: Window,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        """See `LayerAttention.attend_window`."""
        assert self.windowed is not None
        return self.windowed.attend(layer, window, query, key, value, scale, softmax, stored)

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        """See `LayerAttention.mix`."""
        assert self.stateful is not None
        return self.stateful.mix(mixer, hidden, call)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        """See `LayerAttention.attend`."""
        batch, decodes = self.batch, self.batch.num_decodes
        if self.chunks is None:
            if not stored:
                self.transfers.append(layer, NewTokens(batch.seats, batch.positions, batch.lengths, key, value))
            if len(self.lanes) == 1:
                return self._decode(self.lanes[0], layer, query, key, value, scale, softmax, stored)
            return self._decode_lanes(layer, query, key, value, scale, softmax, stored)
        output = torch.empty_like(query)
        if decodes:
            q, k, v = (x[:decodes] for x in (query, key, value))
            output[:decodes] = self._decode_beside_chunks(layer, q, k, v, scale, softmax, stored)
        self.chunks.attend(layer, query, key, value, scale, output, self.staging, softmax, stored=stored)
        return output

    def attend_latents(
        self, layer: int, latents: Latents, query: Tensor, row: Tensor, scale: float, softmax: Softmax = PLAIN
    ) -> Tensor:
        """See `LayerAttention.attend_latents`."""
        decodes = self.batch.num_decodes
        if self.chunks is None:
            return latents.attention(query, lambda absorbed: self.attend(layer, absorbed, row, row, scale, softmax))
        output = query.new_empty((*query.shape[:2], latents.value.shape[1]))
        if decodes:
            own = row[:decodes]
            output[:decodes] = latents.attention(
                query[:decodes], lambda absorbed: self._decode_beside_chunks(layer, absorbed, own, own, scale, softmax)
            )
        self.chunks.attend_latents(layer, latents, query, row, scale, output, self.staging, softmax)
        return output

    def _decode_beside_chunks(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softmax: Softmax, stored: bool = False
    ) -> Tensor:
        """Attention of the decode tokens, which come first in a batch, and store what is theirs."""
        batch, decodes = self.batch, self.batch.num_decodes
        if not stored:
            place = (batch.seats[:decodes], batch.positions[:decodes], batch.lengths[:decodes])
            self.transfers.append(layer, NewTokens(*place, key, value))
        return self._decode_lanes(layer, query, key, value, scale, softmax, stored)

    def _decode_lanes(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softmax: Softmax, stored: bool
    ) -> Tensor:
        output = torch.empty_like(query)
        for lane in self.lanes:
            q, k, v = (x[lane.part] for x in (query, key, value))
            output[lane.part] = self._decode(lane, layer, q, k, v, scale, softmax, stored)
        return output

    def _decode(
        self,
        lane: RunningLane,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax,
        stored: bool,
    ) -> Tensor:
        if lane.in_layer is not None and stored:  # its slots hold what the layer has chosen that stored them
            lane.reading = lane.chosen[layer]
        elif lane.in_layer is not None:
            seen, _ = self.transfers.as_stored(layer, key, value)
            self._select_in_layer(lane, lane.in_layer, layer, query, seen, scale, softmax.cap)
        if self.measure_recall:
            self._measure(lane, layer, query, scale, softmax.cap)
        if lane.reading is None:
            return with_sinks(*self._decode_dense(lane, layer, query, key, value, scale, softmax.cap), softmax)
        self.transfers.wait(layer)
        if lane.in_layer is not None or not self.transfers.asynchronous:
            rows = self.transfers.rows(range(layer, layer + 1), lane.reading)[0]
        else:
            if lane.rows is None:
                lane.rows = self.transfers.rows(range(len(self.transfers.resident)), lane.reading)
            rows = lane.rows[layer]
        if self.transfers.verify:
            self.transfers.check_rows(layer, lane.reading, rows)
        output, lse = sparse_attention(query, self.kv.arena.rows, rows, scale, softmax.cap)
        return output if softmax.sinks is None else with_sinks(output, lse, softmax)

    def _select_in_layer(
        self,
        lane: RunningLane,
        selector: LayerSelector,
        layer: int,
        query: Tensor,
        key: Tensor,
        scale: float,
        cap: float | None,
    ) -> None:
        seats, transfers = lane.decode.seats, self.transfers
        view = View(transfers, layer, lane.decode, query, key, scale, self.tile, cap)
        began = self._now()
        selection = selector.select_in_layer(layer, lane.decode, view)
        lane.seconds += self._now() - began
        if not transfers.resident[layer] and view.tokens_read is not None:  # the keys it looked at were streamed in
            self.meter.streamed(seats, view.tokens_read * self.kv.host.layout.layers[layer].key_bytes)
        lane.reading = self.kv.read(seats, selection, layer, lane.reader)
        if layer in self.kv.read_again:
            lane.chosen[layer] = lane.reading
        self.meter.sparse(lane.reading, transfers.tiers.resident, layer)

    def _decode_dense(
        self, lane: RunningLane, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attention to all that is stored, and its log-sum-exp."""
        transfers, seats = self.transfers, lane.decode.seats
        if transfers.in_reach(layer):
            home = transfers.home(layer)
            pages, lengths = home.table_of(layer).index_select(0, seats), lane.decode.lengths
            return paged_attention(query, home.by_page(layer), pages, lengths, scale, cap, tile=self.tile)
        # The token itself is on its way to the host, and stands beside the tiles.
        stored = transfers.as_stored(layer, key, value)
        vectors = vectors_in(transfers.tiers.tokens.rows, key.shape[-1])  # of a latent one, which is both
        own = torch.stack(stored[:vectors], dim=2).flatten(0, 1)
        place = torch.arange(len(own), device=own.device).view(*key.shape[:2], 1)
        parts = [sparse_attention(query, own, place, scale, cap)]
        assert self.staging is not None and lane.read is not None
        for tile in self.staging.tiles(layer, lane.read):
            absent = torch.arange(tile.start, tile.stop, device=key.device) >= lane.decode.positions[:, None]
            rows = tile.rows().masked_fill(absent[:, None], -1)  # [R, Hkv, T]
            parts.append(sparse_attention(query, tile.buffer, rows, scale, cap))
        outputs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
        return merge_partials(outputs, lses), torch.logsumexp(lses, dim=0)

    def _measure(self, lane: RunningLane, layer: int, query: Tensor, scale: float, cap: float | None) -> None:
        """Count the share of the layer's true attention that is read, and show it to the observer."""
        seats, share = lane.decode.seats, torch.ones_like(lane.decode.seats, dtype=torch.float64)
        tokens = None if lane.reading is None else lane.reading.selection.tokens[:, lane.reader.head_map[layer]]  # [R, Hkv, B]
        if tokens is not None or self.observer is not None:
            logits = true_logits(self.transfers, layer, lane.decode, query, scale, self.tile, cap)
            weights = torch.softmax(logits, dim=-1)
            if self.observer is not None:
                self.observer(layer, lane.decode, weights, tokens)
            share = share if tokens is None else covered(weights, tokens)
        self.meter.recall(layer, seats, share)


def _synchronised(device: torch.device) -> float:
    """The time when a GPU has done what it was given."""
    torch.cuda.synchronize(device)
    return time.perf_counter()
