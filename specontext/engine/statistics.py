"""What really happened in the decode steps of each request."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import LoadPlan, ModelShape, Selection

FIELDS = (
    "steps",
    "read",
    "selection_bytes",
    "loaded_bytes",
    "full_bytes",
    "overlap",
    "overlap_steps",
    "hits",
    "selected",
    "recall",
)


class Meter:
    """Counters of every seat, kept on the device and read when a request ends.

    Entries are counted for (layer, KV head) pairs, so a method with one set for all heads counts it once a head.

    Args:
        head_map: int64 [L, Hkv].
        tables: 1 when one selection serves all layers, L when layers select for themselves.
    """

    def __init__(
        self,
        shape: ModelShape,
        head_map: Tensor,
        resident: tuple[bool, ...],
        *,
        tables: int,
        groups: int,
        seats: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.shape, self.tables = shape, tables
        self.pairs = shape.layers * shape.kv_heads
        self.counts = torch.zeros((seats, len(FIELDS)), dtype=torch.float64, device=device)
        members = torch.nn.functional.one_hot(head_map, groups).sum(1)  # [L, G], KV heads of a layer that read a group
        self.readers = members.to(device=device, dtype=torch.float64)
        offloaded = torch.tensor([not r for r in resident], device=device)
        self.loaders = self.readers * offloaded[:, None]
        self.before = torch.zeros((tables, seats, groups, max_tokens), dtype=torch.bool, device=device)
        self.has_before = torch.zeros((tables, seats), dtype=torch.bool, device=device)

    def reset(self, seat: int) -> None:
        self.counts[seat] = 0
        self.before[:, seat] = False
        self.has_before[:, seat] = False

    def _add(self, field: str, seats: Tensor, value: Tensor | float) -> None:
        column = self.counts[:, FIELDS.index(field)]
        value = (
            value.to(column.dtype)
            if isinstance(value, Tensor)
            else torch.full(seats.shape, value, dtype=column.dtype, device=column.device)
        )
        column.index_add_(0, seats, value)

    def step(self, seats: Tensor, lengths: Tensor, selection_bytes: Tensor) -> None:
        """Count one decode step of requests with `lengths` [R] tokens in context."""
        self._add("steps", seats, 1.0)
        self._add("selection_bytes", seats, selection_bytes)
        self._add("full_bytes", seats, lengths * self.shape.kv_bytes_per_token)

    def dense(self, seats: Tensor, lengths: Tensor, *, offloaded: bool) -> None:
        """Count one layer that read all entries, streamed in from the host when it is offloaded."""
        rows = lengths * self.shape.kv_heads
        self._add("read", seats, rows)
        self._add("selected", seats, rows)
        self._add("loaded_bytes" if offloaded else "hits", seats, rows * (self.shape.row_bytes if offloaded else 1))

    def streamed(self, seats: Tensor, byte_counts: Tensor) -> None:
        """Count bytes moved from the host beside the loads of a plan."""
        self._add("loaded_bytes", seats, byte_counts)

    def sparse(self, seats: Tensor, selection: Selection, plan: LoadPlan | None, layer: int | None) -> None:
        """Count a selection and its loads, read by all layers or by the one that selected."""
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        readers, loaders = self.readers[layers].sum(0), self.loaders[layers].sum(0)  # [G]
        chosen = (selection.tokens >= 0).sum(-1) * readers  # [R, G]
        missing = plan.missing.sum(-1) * loaders if plan is not None else torch.zeros_like(chosen)
        self._add("read", seats, chosen.sum(-1))
        self._add("selected", seats, chosen.sum(-1))
        self._add("hits", seats, (chosen - missing).sum(-1))
        self._add("loaded_bytes", seats, missing.sum(-1) * self.shape.row_bytes)
        self._overlap(seats, selection, 0 if layer is None else layer)

    def _overlap(self, seats: Tensor, selection: Selection, table: int) -> None:
        scored = selection.scored
        before = self.before[table]
        request, group, entry = scored.nonzero(as_tuple=True)
        token = selection.tokens[request, group, entry]
        again = torch.zeros_like(scored)
        again[request, group, entry] = before[seats[request], group, token]
        total = scored.sum((1, 2))
        counts = self.has_before[table, seats] & (total > 0)
        share = again.sum((1, 2)) / total.clamp(min=1)
        self._add("overlap", seats, torch.where(counts, share.double(), 0.0))
        self._add("overlap_steps", seats, counts)
        before[seats] = False
        before[seats[request], group, token] = True
        self.has_before[table, seats] = total > 0

    def recall(self, seats: Tensor, share: Tensor) -> None:
        """Count one layer's share [R] of true attention mass that its selection covers."""
        self._add("recall", seats, share / self.shape.layers)

    def report(self, seat: int) -> dict[str, object]:
        """Means over the decode steps of a request; None where there is nothing to measure."""
        count = dict(zip(FIELDS, self.counts[seat].tolist(), strict=True))
        steps = count["steps"]

        def mean(value: float, over: float) -> float | None:
            return value / over if over else None

        return {
            "decode_steps": int(steps),
            "tokens_read_per_step": mean(count["read"], steps * self.pairs),
            "selection_bytes_per_step": mean(count["selection_bytes"], steps),
            "bytes_loaded_per_step": mean(count["loaded_bytes"], steps),
            "bytes_full_per_step": mean(count["full_bytes"], steps),
            "overlap": mean(count["overlap"], count["overlap_steps"]),
            "hit_rate": mean(count["hits"], count["selected"]),
            "attention_recall": mean(count["recall"], steps),
        }
