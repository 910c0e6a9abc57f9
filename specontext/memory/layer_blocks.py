"""Which layers lie side by side on the host, so that one read brings a token's rows of all of them.

One selection serves all layers: what one layer misses, its neighbours miss as well. A bus reads pieces of less than 2 KiB much
more slowly than larger ones (an H100: 512 bytes at 14 GB/s, 2 KiB at 48), so the rows of a token and KV head in a *block* of
neighbouring layers are one piece of at least that:

    host page: [token, KV head, place of the layer in its block, K|V, D]

Every block has room for as many layers as the largest; places that a smaller one leaves over are never touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

LEAST_PIECE = 2048  # bytes that a bus reads at full speed

Groups = Sequence[int]  # the retrieval group that each KV head of a layer reads


@dataclass(frozen=True)
class LayerBlocks:
    """A division of layers into blocks.

    Attributes:
        sizes: layers of each block, in the order of the layers.
        places: layers for which each block has room.
        layers: those that keep rows of all their tokens, in their order; others belong to no block.
    """

    sizes: tuple[int, ...]
    places: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        assert sum(self.sizes) == len(self.layers) and list(self.layers) == sorted(set(self.layers))
        assert all(0 < size <= self.places for size in self.sizes)

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Layers of each block, ascending."""
        found, first = [], 0
        for size in self.sizes:
            found.append(self.layers[first : first + size])
            first += size
        return tuple(found)

    @cached_property
    def home(self) -> dict[int, tuple[int, int]]:
        """Block and place of each layer that has one."""
        return {layer: (b, place) for b, members in enumerate(self.members) for place, layer in enumerate(members)}

    def of(self, layers: Sequence[int]) -> list[int]:
        """Blocks that some layers belong to, ascending."""
        return sorted({self.home[layer][0] for layer in layers})

    def reads(self, head_map: Sequence[Groups]) -> int:
        """Reads that bring a token's rows in all layers: one for each block and KV head, or more where a head reads other groups
        in some of a block's layers."""
        heads = range(len(head_map[0]))
        return sum(len({head_map[layer][head] for layer in members}) for members in self.members for head in heads)

    def read_bytes(self, away: int, row_bytes: int, piece: int) -> int:
        """What reading a token and KV head in the last `away` layers costs a bus, in bytes at full speed.

        Args:
            row_bytes: of one layer.
            piece: bytes that a smaller piece of a block takes as long as.
        """
        blocks = Counter(self.home[layer][0] for layer in self.layers[len(self.layers) - away :])
        return sum(max(piece, count * row_bytes) for count in blocks.values())

    @cached_property
    def places_away(self) -> tuple[int, ...]:
        """Places that the last i layers take on the host, i from 0 to all: those of whole blocks."""
        blocks = [self.home[layer][0] for layer in self.layers]
        return (0, *((blocks[-1] - block + 1) * self.places for block in reversed(blocks)))


def one_by_one(layers: int) -> LayerBlocks:
    """Blocks of a single layer."""
    return LayerBlocks((1,) * layers, 1, tuple(range(layers)))


def divide_layers(
    head_map: Sequence[Groups], row_bytes: int, *, layers: Sequence[int] | None = None, least: int = LEAST_PIECE
) -> LayerBlocks:
    """The fewest layers a block that make a piece of `least` bytes, in bands of layers that read alike.

    A piece is never smaller, unless its band is, and never twice as large or larger. Among such divisions it is the one that
    leaves over the fewest places, and then the one with the smallest blocks, whose first layer waits the least.

    Args:
        head_map: the retrieval group of each KV head of each layer.
        row_bytes: bytes of a row: what a token and KV head have in one layer.
        layers: those that keep rows of all their tokens (no rings of a window, no states); all of them when None.
    """
    layers = range(len(head_map)) if layers is None else layers
    lengths = _band_lengths([head_map[layer] for layer in layers])
    fewest = -(-least // row_bytes)
    best: tuple[int, int, list[int]] | None = None
    for most in range(fewest, 2 * fewest):
        sizes = [size for length in lengths for size in _even(length, -(-length // most))]
        if all(length // -(-length // most) >= min(fewest, length) for length in lengths):
            places = max(sizes, default=1)
            left_over = places * len(sizes)
            if best is None or (left_over, places) < best[:2]:
                best = left_over, places, sizes
    assert best is not None, "2 * fewest - 1 layers always serve"
    return LayerBlocks(tuple(best[2]), best[1], tuple(layers))


def _band_lengths(head_map: Sequence[Groups]) -> list[int]:
    """Layers of each band: one ends where no KV head goes on reading its group.

    A map that was measured may send single heads elsewhere from layer to layer; that ends no band, and only these heads' rows
    are read for themselves.
    """
    lengths: list[int] = []
    for layer, groups in enumerate(head_map):
        if layer and any(a == b for a, b in zip(groups, head_map[layer - 1], strict=True)):
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


def _even(length: int, parts: int) -> list[int]:
    """`length` divided into `parts` that differ by one at most, larger ones first."""
    least, more = divmod(length, parts)
    return [least + 1] * more + [least] * (parts - more)
