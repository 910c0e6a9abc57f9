"""What a layer of the model hands to a step, from function to function."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specontext.kernels.softmax import PLAIN, Softmax


@dataclass(frozen=True, eq=False, slots=True)
class LayerCall:
    """Queries, keys and values of packed tokens in one layer, whose attention is asked for.

    Attributes:
        layer: its number among its kind.
        query: [T, Hq, D].
        key, value: [T, Hkv, D]; the same rows [T, 1, D] where they are latents.
        scale, softmax: how weights are made of products.
        stored: an earlier layer has stored these keys and values.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softmax: Softmax = PLAIN
    stored: bool = False

    def of(self, part: slice) -> LayerCall:
        """The same of some of the tokens."""
        query, key, value = self.query[part], self.key[part], self.value[part]
        return LayerCall(self.layer, query, key, value, self.scale, self.softmax, self.stored)
