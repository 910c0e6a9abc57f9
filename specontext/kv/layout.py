"""How KV lies in pages: what a row is made of, which layers keep what, and where the rows of both tiers are.

    row     one token (or slot) of one KV head of one layer: its parts one after the other, [K|V, D], or codes and scales of both,
            or one latent [1, D], which is key and value at once; of rows in 8 bits a page has all codes, and then all scales
    entry   the rows of all KV heads of a token (or slot)
    page    `page_size` entries: of one layer on the device, of a block of neighbouring layers on the host
    piece   the rows of one token and KV head in the layers of a block, side by side

What kernels are handed is made by `PagePool.paged` and `slots` of either tier's pool, from the places that a layout gives layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.core import Selection, SlotPlan
from specontext.kernels.tables import Parts, Places
from specontext.memory.layer_blocks import Groups, LayerBlocks, divide_layers, one_by_one
from specontext.model_shape import ModelShape

LATENT, SCALES = "latent", "scales"  # parts of rows


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

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys of an entry; a latent is read whole."""
        return self.entry_bytes if self.parts[0].name == LATENT else self.entry_bytes // 2


@dataclass(frozen=True)
class Layout:
    """What all layers keep, in pages of as many entries.

    Attributes:
        layer_blocks: the layers that lie side by side on the host: of those in which every token has an entry.
        others: number format of what else lies in pages, the retrieval head's keys and the state of known prompts.
    """

    layers: tuple[LayerLayout, ...]
    page_size: int
    layer_blocks: LayerBlocks
    others: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        assert list(self.layer_blocks.layers) == self.full

    @classmethod
    def of_shape(cls, shape: ModelShape, page_size: int, layer_blocks: LayerBlocks | None = None) -> Layout:
        """Keys and values of every token in every layer, as the device has them; by default in blocks of layers that all read
        alike."""
        numbers = shape.dtype if shape.kv_dtype is None else shape.kv_dtype
        names = (LATENT,) if shape.latent is not None else ("key", "value")
        kv = tuple(Part(name, shape.part_numbers, numbers) for name in names)
        if shape.kv_dtype is not None:
            kv += (Part(SCALES, 2, torch.bfloat16),)
        if layer_blocks is None:
            layer_blocks = divide_layers(((0,),) * shape.layers, shape.on_host.row_bytes)
        return cls((LayerLayout(kv, shape.kv_heads),) * shape.layers, page_size, layer_blocks, shape.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one layer; on the device pages serve whichever layer takes them."""
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

    def row_size(self) -> tuple[int, ...]:
        """What kernels read of a row: [K|V, D], a latent [1, D], or its bytes where scales follow the codes."""
        rows = {layer.parts for layer in self.layers}
        assert len(rows) == 1, "rows of several kinds, which no kernel reads"
        (parts,) = rows
        if len({(part.numbers, part.dtype) for part in parts}) == 1:
            return len(parts), parts[0].numbers
        assert parts[-1].name == SCALES and parts[0].dtype.itemsize == 1, "rows of a kind that no kernel reads"
        return (self.layers[0].row_bytes,)

    @property
    def heads(self) -> int:
        """Rows of an entry, where all layers have as many."""
        (heads,) = {layer.heads for layer in self.layers}
        return heads

    @property
    def dtype(self) -> torch.dtype:
        """Number format of keys and values, or of their codes."""
        (dtype,) = {layer.parts[0].dtype for layer in self.layers}
        return dtype

    @property
    def by_layer(self) -> LayerBlocks:
        """Layers each by itself, as they lie on the device."""
        return one_by_one(len(self.layers))


def places_of(blocks: LayerBlocks, device: torch.device) -> Places:
    """Where layers are in a pool that holds these blocks."""
    homes = tuple(blocks.home[layer] for layer in blocks.layers)
    lines, places = torch.tensor(homes, dtype=torch.int64).T.contiguous().to(device)
    return Places(homes, lines, places, blocks.places)


@dataclass(frozen=True, eq=False)
class BlockParts:
    """What one read of the host brings: the layers of a block in which a KV head reads the same retrieval group.

    With a head map that is the same for all layers of a block, a read brings the rows of all of them. Where a map was measured,
    and a head reads another group in some of these layers, its pieces fall apart into a part for each group. (The alternative,
    heads in another order on the host, would need that order wherever the host is read or written, serves only one of the maps
    that requests may choose, and finds a place for every head only where a map's layers use each group equally often.)

    Attributes:
        all: parts of all blocks, block after block.
        bounds: where each block's parts begin, and where the last one's end.
    """

    all: Parts
    bounds: tuple[int, ...]

    @classmethod
    def of_map(cls, blocks: LayerBlocks, head_map: Sequence[Groups], device: torch.device) -> BlockParts:
        """Parts for heads that read as a head map says."""
        layers: list[list[int]] = []
        heads: list[int] = []
        groups: list[int] = []
        bounds = [0]
        for members in blocks.members:
            for head in range(len(head_map[members[0]])):
                readers: dict[int, list[int]] = {}
                for layer in members:
                    readers.setdefault(head_map[layer][head], []).append(layer)
                for group, those in readers.items():
                    layers.append(those + [-1] * (blocks.places - len(those)))
                    heads.append(head)
                    groups.append(group)
            bounds.append(len(heads))
        members_of, head_of, group_of = (torch.tensor(x, dtype=torch.int64).to(device) for x in (layers, heads, groups))
        return cls(Parts(members_of, head_of, group_of), tuple(bounds))

    def of(self, block: int) -> Parts:
        """Parts of one block."""
        return self.all[self.bounds[block] : self.bounds[block + 1]]


@dataclass(frozen=True, eq=False)
class Reader:
    """How the KV heads of a request's layers read the slot tables.

    Attributes:
        head_map: int64 [L, Hkv], retrieval group that each KV head of each layer reads.
        in_layer: each layer has a table of its own, because it selects for itself; else all read the first.
        blocks: what is loaded together for one selection of all layers.
        layers: the same for each layer by itself.
    """

    head_map: Tensor
    in_layer: bool
    blocks: BlockParts
    layers: BlockParts

    @classmethod
    def of_map(cls, layout: Layout, head_map: Tensor, device: torch.device, *, in_layer: bool = False) -> Reader:
        """The reader of a head map int64 [L, Hkv]."""
        groups = head_map.tolist()
        blocks, layers = (BlockParts.of_map(kind, groups, device) for kind in (layout.layer_blocks, layout.by_layer))
        return cls(head_map.to(device), in_layer, blocks, layers)

    def table(self, layer: int) -> int:
        """Number of the slot table that a layer reads."""
        return layer if self.in_layer else 0


@dataclass(frozen=True, eq=False)
class PlacedSelection:
    """A selection of some requests in a step, of all layers or of the one that selected.

    Attributes:
        seats: int64 [R].
        plan: where its entries are in the slots of offloaded layers; None where no layer needs one.
    """

    seats: Tensor
    selection: Selection
    reader: Reader
    plan: SlotPlan | None = None
