"""What really happened in the decode steps of each request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from specontext.engine.output_statistics import DecodeStatistics
from specontext.kernels.slot_plan import NOTHING, count_selection
from specontext.kv.layout import PlacedSelection
from specontext.memory.learning import Traffic
from specontext.model_shape import ModelShape


class Count(IntEnum):
    """The counters of a seat, columns of a table. The last ones, from READ on, are those of `count_selection` in its order."""

    STEPS = 0
    SELECTION_BYTES = 1
    FULL_BYTES = 2
    CHOOSING_S = 3
    TIMED_STEPS = 4
    READ = 5
    HITS = 6
    LOADED_BYTES = 7
    OVERLAP = 8
    OVERLAP_STEPS = 9


@dataclass(frozen=True)
class MeterState:
    """Counters of one request: float64 [fields], float64 [L] and int32 [tables, G, B]."""

    counts: Tensor
    recalls: Tensor
    before: Tensor


class Meter:
    """Counters of every seat, kept on the device and read when a request ends.

    Entries are counted for (layer, KV head) pairs, so a method with one set for all heads counts it once a head.

    Args:
        head_map: int64 [L, Hkv], of the engine's own method.
        tables: 1 when one selection serves all layers, L when layers may select for themselves.
        budget, sink: entries of a selection, and how many of them are sinks.
    """

    def __init__(
        self,
        shape: ModelShape,
        head_map: Tensor,
        *,
        tables: int,
        groups: int,
        budget: int,
        sink: int,
        seats: int,
        device: torch.device,
    ) -> None:
        self.shape, self.tables, self.sink = shape, tables, sink
        self.pairs = shape.layers * shape.kv_heads
        self._token_bytes, self._row_bytes = shape.kv_bytes_per_token, shape.on_host.row_bytes  # a row that is loaded
        self._layers_reading = Counter(shape.read_order)  # how many layers read the KV of each
        self._windows = shape.windowed if shape.only_windows else ()  # of the layers, where no other are counted
        # One row more than seats: the padding of a batch is counted there.
        self.counts = torch.zeros((seats + 1, len(Count)), dtype=torch.float64, device=device)
        self.left = torch.zeros_like(self.counts[0])  # what was counted for those who had the seats before
        self.recalls = torch.zeros((seats + 1, shape.layers), dtype=torch.float64, device=device)
        self.groups = groups
        self._readers: dict[int, Tensor] = {}
        self._readers_of(head_map)  # now: it waits for the device, which a captured step must not
        # The last selection of every seat, ascending; what was not scored is NOTHING.
        self.before = torch.full((tables, seats + 1, groups, budget), NOTHING, dtype=torch.int32, device=device)

    def reset(self, seat: int) -> None:
        self.left += self.counts[seat]
        self.counts[seat] = 0
        self.recalls[seat] = 0
        self.before[:, seat] = NOTHING

    def forget(self) -> None:
        """Count anew."""
        self.left.zero_()
        for seat in range(len(self.counts)):
            self.reset(seat)
        self.left.zero_()

    def take_back(self, seat: int, before: Tensor) -> None:
        """Count nothing of a seat since its counters were `before`, a copy of all."""
        self.counts[seat] = before[seat]

    def save(self, seat: int) -> MeterState:
        """The counters of a seat, for a request that has to wait."""
        return MeterState(self.counts[seat].clone(), self.recalls[seat].clone(), self.before[:, seat].clone())

    def restore(self, seat: int, state: MeterState) -> None:
        """Go on counting in another seat, which has been reset."""
        self.left -= state.counts
        self.counts[seat], self.recalls[seat], self.before[:, seat] = state.counts, state.recalls, state.before

    def _add(self, count: Count, seats: Tensor, value: Tensor | float) -> None:
        column = self.counts[:, count]
        value = (
            value.to(column.dtype)
            if isinstance(value, Tensor)
            else torch.full(seats.shape, value, dtype=column.dtype, device=column.device)
        )
        column.index_add_(0, seats, value)

    def decoded(self, seats: Tensor, lengths: Tensor, selection_bytes: Tensor) -> None:
        """Count one decode step of requests with `lengths` [R] tokens in context."""
        self._add(Count.STEPS, seats, 1.0)
        self._add(Count.SELECTION_BYTES, seats, selection_bytes)
        self._add(Count.FULL_BYTES, seats, lengths * self._token_bytes)

    def dense(self, seats: Tensor, lengths: Tensor, *, resident: int) -> None:
        """Count a step in which all layers read all entries, streamed in from the host for all but `resident` layers."""
        rows = lengths * self.shape.kv_heads
        if self._windows:  # the mean over all of them, as if it were that of the one layer that is counted
            firsts = [window.first(lengths - 1).clamp(min=0) for window in self._windows]
            rows = (lengths - torch.stack(firsts).double().mean(0)) * self.shape.kv_heads
        self._add(Count.READ, seats, rows * self.shape.layers)
        self._add(Count.HITS, seats, rows * resident)
        self._add(Count.LOADED_BYTES, seats, rows * ((self.shape.layers - resident) * self._row_bytes))

    def streamed(self, seats: Tensor, byte_counts: Tensor) -> None:
        """Count bytes moved from the host beside the loads of a plan."""
        self._add(Count.LOADED_BYTES, seats, byte_counts)

    def chosen(self, seats: Tensor, seconds: float) -> None:
        """Count the seconds that choosing took for each request in a step."""
        self._add(Count.CHOOSING_S, seats, seconds)
        self._add(Count.TIMED_STEPS, seats, 1.0)

    def sparse(self, reading: PlacedSelection, resident: Tensor, layer: int | None = None) -> None:
        """Count a selection and its loads, read by all layers or by the one that selected.

        Args:
            resident: bool [L], layers that load nothing.
        """
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        selection, plan, head_map = reading.selection, reading.plan, reading.reader.head_map
        readers = self._readers.get(id(head_map))
        count_selection(
            self.counts[:, Count.READ :],
            self.before[0 if layer is None else layer],
            reading.seats,
            selection.tokens,
            selection.scored,
            plan.missing if plan is not None else None,
            (self._readers_of(head_map) if readers is None else readers)[layers],
            resident[layers],
            sink=self.sink,
            row_bytes=self._row_bytes,
        )

    def _readers_of(self, head_map: Tensor) -> Tensor:
        """KV heads of each layer that read a group, int64 [L, G]."""
        if id(head_map) not in self._readers:
            self._readers[id(head_map)] = torch.nn.functional.one_hot(head_map, self.groups).sum(1).to(self.counts.device)
        return self._readers[id(head_map)]

    def recall(self, layer: int, seats: Tensor, share: Tensor) -> None:
        """Count a layer's share [R] of true attention mass that its selection covers: of those that read one KV the mean."""
        self.recalls[:, layer].index_add_(0, seats, share.double() / max(1, self._layers_reading[layer]))

    def report(self, seat: int) -> DecodeStatistics:
        """Means over the decode steps of a request."""
        return self._means(torch.cat((self.counts[seat], self.recalls[seat])).tolist())

    def overview(self, seats: Sequence[int]) -> tuple[list[DecodeStatistics], list[float]]:
        """Reports of some requests, and every `Count` of all requests that there ever were, in one reading of the device."""
        counts = self.counts[:-1]
        totals = torch.nn.functional.pad(self.left + counts.sum(0), (0, self.shape.layers))
        *rows, total = torch.cat((torch.cat((counts, self.recalls[:-1]), dim=1), totals[None])).tolist()
        return [self._means(rows[seat]) for seat in seats], total[: len(Count)]

    def traffic(self) -> Traffic:
        """What was counted of selections, of all requests that there ever were."""
        totals = (self.left + self.counts[:-1].sum(0)).tolist()
        return Traffic(*(totals[count] for count in (Count.READ, Count.HITS, Count.OVERLAP, Count.OVERLAP_STEPS)))

    def _means(self, row: list[float]) -> DecodeStatistics:
        """A report, from a row of counters and the recall of each layer."""
        recalls, steps = row[len(Count) :], row[Count.STEPS]

        def mean(count: Count, over: float) -> float | None:
            return row[count] / over if over else None

        return DecodeStatistics(
            decode_steps=int(steps),
            tokens_read_per_step=mean(Count.READ, steps * self.pairs),
            selection_bytes_per_step=mean(Count.SELECTION_BYTES, steps),
            bytes_loaded_per_step=mean(Count.LOADED_BYTES, steps),
            bytes_full_per_step=mean(Count.FULL_BYTES, steps),
            overlap=mean(Count.OVERLAP, row[Count.OVERLAP_STEPS]),
            hit_rate=mean(Count.HITS, row[Count.READ]),
            attention_recall=sum(recalls) / (steps * len(recalls)) if steps else None,
            attention_recall_by_layer=[recall / steps for recall in recalls] if steps else None,
            selection_s_per_step=mean(Count.CHOOSING_S, row[Count.TIMED_STEPS]),
        )
