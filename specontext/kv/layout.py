"""How KV lies in pages: what a row is made of, which layers keep what, and where the rows of both tiers are.

    row     one token (or slot) of one KV head of one layer: its parts one after the other, here [K|V, D]
    entry   the rows of all KV heads of a token (or slot)
    page    `page_size` entries of one layer

What kernels are handed is made by `Layout.pages`: the one place that says which rows of a pool an entry of a seat has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.core import LoadPlan, ModelShape, Selection
from specontext.kernels.tables import Pages


@dataclass(frozen=True)
class Part:
    """Numbers of a row that belong together, such as a key."""

    name: str
    numbers: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


@dataclass(frozen=True)
class LayerLayout:
    """What one layer keeps.

    Attributes:
        parts: of a row.
        heads: rows of an entry.
        entries: how many it keeps at most, as a ring of the last tokens or as a state does; None where every token has one.
    """

    parts: tuple[Part, ...]
    heads: int
    entries: int | None = None

    @property
    def row_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def entry_bytes(self) -> int:
        return self.heads * self.row_bytes


@dataclass(frozen=True)
class Layout:
    """What all layers keep, in pages of as many entries."""

    layers: tuple[LayerLayout, ...]
    page_size: int

    @classmethod
    def of_shape(cls, shape: ModelShape, page_size: int) -> Layout:
        """Keys and values of every token in every layer."""
        parts = tuple(Part(name, shape.head_dim, shape.dtype) for name in ("key", "value"))
        return cls((LayerLayout(parts, shape.kv_heads),) * shape.layers, page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page; pages serve whichever layer takes them."""
        return self.page_size * max(layer.entry_bytes for layer in self.layers)

    @property
    def full(self) -> list[int]:
        """Layers in which every token has an entry: those whose KV grows, is selected from, and moves."""
        return [number for number, layer in enumerate(self.layers) if layer.entries is None]

    def pages_of(self, entries: int) -> int:
        """Pages of so many entries."""
        return -(-entries // self.page_size)

    def pages_for(self, layer: int, tokens: int) -> int:
        """Pages of so many tokens in a layer."""
        most = self.layers[layer].entries
        return self.pages_of(tokens if most is None else min(tokens, most))

    def row_size(self) -> tuple[int, int]:
        """[K|V, D] of a row, where all parts of all layers are as long: what today's kernels read."""
        sizes = {(len(layer.parts), *{part.numbers for part in layer.parts}) for layer in self.layers}
        assert len(sizes) == 1 and all(len(size) == 2 for size in sizes), "rows of several kinds, which no kernel reads"
        (count, numbers), *_ = sizes
        return count, numbers

    @property
    def heads(self) -> int:
        """Rows of an entry, where all layers have as many."""
        (heads,) = {layer.heads for layer in self.layers}
        return heads

    @property
    def dtype(self) -> torch.dtype:
        """Number format of all parts."""
        (dtype,) = {part.dtype for layer in self.layers for part in layer.parts}
        return dtype

    def pages(self, rows: Tensor, table: Tensor) -> Pages:
        """Rows of a pool and a page table, as kernels are handed them."""
        return Pages(rows, table, self.page_size, self.heads)


@dataclass(frozen=True, eq=False)
class Reader:
    """How the KV heads of a request's layers read the slot tables.

    Attributes:
        head_map: int64 [L, Hkv], retrieval group that each KV head of each layer reads.
        in_layer: each layer has a table of its own, because it selects for itself; else all read the first.
    """

    head_map: Tensor
    in_layer: bool = False

    def table(self, layer: int) -> int:
        """Number of the slot table that a layer reads."""
        return layer if self.in_layer else 0


@dataclass(frozen=True, eq=False)
class Reading:
    """A selection of some requests in a step, of all layers or of the one that selected.

    Attributes:
        seats: int64 [R].
        plan: where its entries are in the slots of offloaded layers; None where no layer needs one.
    """

    seats: Tensor
    selection: Selection
    reader: Reader
    plan: LoadPlan | None = None
