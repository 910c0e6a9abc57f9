"""One step of the model seen from its attention layers: decode tokens store KV, choose, load and attend. Prompt chunks are
`prefill.py`'s."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from specontext.core import Batch, Lane
from specontext.engine.dense_decode import attend_to_all
from specontext.engine.lanes import RunningLane
from specontext.engine.layer_call import LayerCall
from specontext.engine.methods import Methods
from specontext.engine.prefill import Chunks
from specontext.engine.states import StatefulStep
from specontext.engine.statistics import Meter
from specontext.engine.true_attention import AttentionObserver, View, covered, true_logits
from specontext.engine.windows import WindowedStep
from specontext.kernels.latents import Latents
from specontext.kernels.softmax import PLAIN, Softmax, with_sinks
from specontext.kernels.sparse_attention import sparse_attention
from specontext.kernels.tables import NewTokens
from specontext.kv.cache import KVCache
from specontext.kv.staging import DenseRead, Staging
from specontext.kv.streams import STATISTICS, Mark
from specontext.layer_sizes import Window
from specontext.memory.tiles import DECODE_TILE, LEAST_TILE, prompt_tile
from specontext.models.mixers import MixerCall
from specontext.retrieval.selector import AheadSelector, ForeseeingSelector, LaneTokens, LayerSelector

# Shows the decode tokens of some lanes of a batch, with full attention, to the methods that have to know it beforehand.
LookAhead = Callable[[Batch, Sequence[RunningLane]], None]

TILE = 1024  # tokens of one tile on a CPU


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
        decodes = slice(batch.num_decodes)
        self._decodes = batch.seats[decodes], batch.positions[decodes], batch.lengths[decodes]  # where their KV is stored
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
        return RunningLane(selector, ahead, in_layer, reader, decode, part, read)

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
        return self.windowed.attend(window, LayerCall(layer, query, key, value, scale, softmax, stored))

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
        call = LayerCall(layer, query, key, value, scale, softmax, stored)
        if self.chunks is not None:
            output = torch.empty_like(query)
            if self.lanes:
                decodes = slice(self.batch.num_decodes)
                output[decodes] = self._decode_lanes(call.of(decodes))
            self.chunks.attend(call, output, self.staging)
            return output
        if len(self.lanes) > 1:
            return self._decode_lanes(call)
        if not stored:
            self.transfers.append(layer, NewTokens(*self._decodes, key, value))
        return self._decode(self.lanes[0], call)

    def attend_latents(
        self, layer: int, latents: Latents, query: Tensor, row: Tensor, scale: float, softmax: Softmax = PLAIN
    ) -> Tensor:
        """See `LayerAttention.attend_latents`."""
        if self.chunks is None:
            return latents.attention(query, lambda absorbed: self.attend(layer, absorbed, row, row, scale, softmax))
        call = LayerCall(layer, query, row, row, scale, softmax)
        output = query.new_empty((*query.shape[:2], latents.value.shape[1]))
        if self.lanes:
            own = call.of(slice(self.batch.num_decodes))
            output[: len(own.query)] = latents.attention(
                own.query, lambda absorbed: self._decode_lanes(replace(own, query=absorbed))
            )
        self.chunks.attend_latents(latents, call, output, self.staging)
        return output

    def _decode_lanes(self, call: LayerCall) -> Tensor:
        """Attention of all decode tokens, which store what is theirs."""
        if not call.stored:
            self.transfers.append(call.layer, NewTokens(*self._decodes, call.key, call.value))
        output = torch.empty_like(call.query)
        for lane in self.lanes:
            output[lane.part] = self._decode(lane, call.of(lane.part))
        return output

    def _decode(self, lane: RunningLane, call: LayerCall) -> Tensor:
        layer, softmax = call.layer, call.softmax
        if lane.in_layer is not None and call.stored:  # its slots hold what the layer has chosen that stored them
            lane.reading = lane.chosen[layer]
        elif lane.in_layer is not None:
            self._select_in_layer(lane, lane.in_layer, call)
        if self.measure_recall:
            self._measure(lane, call)
        if lane.reading is None:
            return attend_to_all(self.transfers, lane, call, self.staging, self.tile)
        self.transfers.wait(layer)
        if lane.in_layer is not None or not self.transfers.asynchronous:
            rows = self.transfers.rows(range(layer, layer + 1), lane.reading)[0]
        else:
            if lane.rows is None:
                lane.rows = self.transfers.rows(range(len(self.transfers.resident)), lane.reading)
            rows = lane.rows[layer]
        if self.transfers.verify:
            self.transfers.check_rows(layer, lane.reading, rows)
        output, lse = sparse_attention(call.query, self.kv.arena.rows, rows, call.scale, softmax.cap)
        return output if softmax.sinks is None else with_sinks(output, lse, softmax)

    def _select_in_layer(self, lane: RunningLane, selector: LayerSelector, call: LayerCall) -> None:
        layer, seats, transfers = call.layer, lane.decode.seats, self.transfers
        view = View(transfers, call, lane.decode, self.tile)
        began = self._now()
        selection = selector.select_in_layer(layer, lane.decode, view)
        lane.seconds += self._now() - began
        if not transfers.resident[layer] and view.tokens_read is not None:  # the keys it looked at were streamed in
            self.meter.streamed(seats, view.tokens_read * self.kv.host.layout.layers[layer].key_bytes)
        lane.reading = self.kv.read(seats, selection, layer, lane.reader)
        if layer in self.kv.read_again:
            lane.chosen[layer] = lane.reading
        self.meter.sparse(lane.reading, transfers.tiers.resident, layer)

    def _measure(self, lane: RunningLane, call: LayerCall) -> None:
        """Count the share of the layer's true attention that is read, and show it to the observer."""
        layer, seats, share = call.layer, lane.decode.seats, torch.ones_like(lane.decode.seats, dtype=torch.float64)
        tokens = None if lane.reading is None else lane.reading.selection.tokens[:, lane.reader.head_map[layer]]  # [R, Hkv, B]
        if tokens is not None or self.observer is not None:
            weights = torch.softmax(true_logits(self.transfers, call, lane.decode, self.tile), dim=-1)
            if self.observer is not None:
                self.observer(layer, lane.decode, weights, tokens)
            share = share if tokens is None else covered(weights, tokens)
        self.meter.recall(layer, seats, share)


def _synchronised(device: torch.device) -> float:
    """The time when a GPU has done what it was given."""
    torch.cuda.synchronize(device)
    return time.perf_counter()
