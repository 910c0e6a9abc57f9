"""The bytes of some requests' KV in both tiers, as functions of their tokens and of the layers that are offloaded.

device = tokens * [(L - i) * resident + common] + requests * slots of i layers          i of L layers offloaded
host   = fixed + tokens * layers of the blocks that these i lie in
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from specontext.memory.layer_blocks import LayerBlocks, one_by_one


@dataclass(frozen=True)
class KVCost:
    """Bytes of the KV of some requests as functions of their tokens and of the number of offloaded layers.

    Tokens are summed over the requests, each counted in whole pages.

    Attributes:
        layers: L.
        resident_token: bytes that a token takes on the device in each resident layer.
        common_token: bytes that a token takes on the device in any case: the retrieval head's keys.
        layer_slots: bytes of the device slots of one request in one offloaded layer.
        page_size: tokens of a page.
        spare_layers: layers beside the offloaded ones whose slots are kept free, so that a layer can be moved while requests run.
        host_fixed: bytes on the host as soon as a layer is offloaded.
        blocks: layers that lie side by side on the host, where a block has room for all as soon as one of them is offloaded; None
            where each lies by itself.
        of_host: bytes that a token takes on the host in each layer for which there is room; None where it is as on the device.
    """

    layers: int
    resident_token: int
    common_token: int
    layer_slots: int
    page_size: int = 1
    spare_layers: int = 0
    host_fixed: int = 0
    blocks: LayerBlocks | None = None
    of_host: int | None = None

    def __post_init__(self) -> None:
        assert min(self.layers, self.resident_token, self.page_size) > 0
        assert min(self.common_token, self.layer_slots, self.spare_layers, self.host_fixed) >= 0

    @cached_property
    def host_blocks(self) -> LayerBlocks:
        """How layers lie on the host."""
        return self.blocks or one_by_one(self.layers)

    @property
    def host_token(self) -> int:
        """Bytes of a token in one layer on the host."""
        return self.resident_token if self.of_host is None else self.of_host

    @property
    def host_page(self) -> int:
        """Bytes of a page of the host: of all layers of a block."""
        return self.page_size * self.host_token * self.host_blocks.places

    def host_layers(self, offloaded: int) -> int:
        """Layers for which the host has room while the last `offloaded` ones live there."""
        return self.host_blocks.places_away[offloaded]

    def slot_layers(self, offloaded: int) -> int:
        """Layers whose slots are set aside on the device."""
        return min(offloaded + self.spare_layers, self.layers)

    def slots(self, requests: int, offloaded: int) -> int:
        """Device bytes of the slots of all requests."""
        return requests * self.layer_slots * self.slot_layers(offloaded)

    def device(self, tokens: int, requests: int, offloaded: int) -> int:
        """Bytes on the device; while one layer moves between `offloaded` and the next number, no more than this is held."""
        return tokens * self.token(offloaded) + self.slots(requests, offloaded)

    def host(self, tokens: int, offloaded: int) -> int:
        """Bytes on the host."""
        return self.host_fixed + tokens * self.host_layers(offloaded) * self.host_token if offloaded else 0

    def token(self, offloaded: int) -> int:
        """Device bytes of one more token."""
        return (self.layers - offloaded) * self.resident_token + self.common_token

    def whole_pages(self, length: int) -> int:
        """Tokens of the pages that a request of this length holds."""
        return -(-length // self.page_size) * self.page_size
