"""What one read brings: the layers of a block in which a KV head reads the same retrieval group.

With a head map that is the same for all layers of a block, a read brings the rows of all of them. Where a map was measured, and
a head reads another group in some of these layers, its pieces fall apart into one part for each group. (The alternative,
heads in another order on the host, would need that order wherever the host is read or written, serves only one of the maps
that requests may choose, and finds a place for every head only where a map's layers use each group equally often.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specontext.kernels.pieces import Parts
from specontext.memory.layer_blocks import Groups, LayerBlocks


@dataclass(frozen=True, eq=False)
class BlockParts:
    """Parts of all blocks.

    Attributes:
        all: block after block.
        bounds: where each block's parts begin, and where the last one's end.
    """

    all: Parts
    bounds: tuple[int, ...]

    def of(self, block: int) -> Parts:
        """Parts of one block."""
        return self.all[self.bounds[block] : self.bounds[block + 1]]


def parts_of(blocks: LayerBlocks, head_map: Sequence[Groups], device: torch.device) -> BlockParts:
    """Parts for heads that read as a head map says: int, by layer and KV head."""
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
    return BlockParts(Parts(members_of, head_of, group_of, len(head_map[0])), tuple(bounds))
