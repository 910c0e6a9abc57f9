"""What a layer keeps of the tokens before: a window of them, a state, a latent; and the sizes of rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to import, and only annotations here need it
    import torch


SCALE_BYTES = 2  # of a key or value in 8 bits
NOBODY_S_NUMBERS = 8  # of a key that no layer stores, see `ModelShape`: rows of whole words, which kernels copy


@dataclass(frozen=True)
class Window:
    """What a token attends to in a layer that does not read the whole context.

    Attributes:
        size: the last so many tokens, itself among them; or tokens of a chunk.
        chunked: the context is cut into chunks of this size, and a token reads those of its own chunk up to itself.
    """

    size: int
    chunked: bool = False

    def first(self, position: Any) -> Any:
        """The first token that the one at `position` reads, perhaps below 0; both numbers, or tensors of them."""
        return position // self.size * self.size if self.chunked else position - (self.size - 1)


class Place(NamedTuple):
    """Where the attention of a layer finds its KV.

    Attributes:
        layer: among the layers that keep KV and have a window as this one has, or have none.
        window: of the layer; None where it attends to the whole context.
        stored: the layer keeps no KV of its own: it reads what an earlier one has stored, which is number `layer`.
    """

    layer: int
    window: Window | None
    stored: bool = False


def repeated(layers: Sequence[int]) -> frozenset[int]:
    """Those that come more than once."""
    return frozenset(layer for layer, times in Counter(layers).items() if times > 1)


@dataclass(frozen=True)
class StateTensor:
    """Numbers of fixed size that a layer keeps of all tokens of a request instead of their KV, or beside it.

    Attributes:
        mixer: the module that keeps them, numbered among those that keep any: linear attention, a state-space model, a short
            convolution.
        recurrent: a state that every token changes; else the last inputs of a convolution.
        index: which of the module's states of this kind.
        shape: of one request's.
    """

    mixer: int
    recurrent: bool
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LatentSizes:
    """What keys and values are made of where attention is multi-head latent attention.

    All that is stored of a token in a layer is one row: the latent, of which keys and values of all heads are linear maps, and
    the numbers of the keys that RoPE turns, which all heads share.

    Attributes:
        rank: numbers of the latent (kv_lora_rank).
        rotated: numbers that RoPE turns (qk_rope_head_dim).
        key, value: of a head's key, those that RoPE turns among them, and of its value, once they are made.
    """

    rank: int
    rotated: int
    key: int
    value: int

    @property
    def row(self) -> int:
        """Numbers of a row."""
        return self.rank + self.rotated
