"""Multi-head latent attention: a token's keys and values in all heads are linear maps of one latent, which is all that is stored.

    key of head h    = [ A_h latent | rotated ]        rotated: the part that RoPE turns, which all heads share
    value of head h  = B_h latent

So attention can be computed in latent space, as attention of all query heads to one KV head whose rows [latent | rotated] are
key and value at once: q_h A_h is a query for latents, and the weighted sum of latents becomes the head's output by B_h (the
absorbed form of DeepSeek-V2, arXiv 2405.04434). A step that decodes reads each row once for all heads then. Of a pair of a query
and a stored token it costs 4 (rank + rotated) operations a head, and 2 (key + value) where keys and values were made first; to
make those of a token costs 2 rank (nope + value) a head. So for many queries they are made, tile by tile: see `making_pays`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.kernels.dense_attention import causal_attention
from specontext.kernels.softmax import PLAIN, Softmax


@dataclass(frozen=True, eq=False)
class Latents:
    """How a layer makes keys and values of latents.

    Attributes:
        key: A of all heads, [Hq, nope, rank]; a key has nope numbers that RoPE does not turn.
        value: B of all heads, [Hq, V, rank].
    """

    key: Tensor
    value: Tensor

    def absorbed(self, query: Tensor) -> Tensor:
        """Queries [.., T, Hq, nope + rotated] as queries for rows: [.., T, Hq, rank + rotated]."""
        nope = self.key.shape[1]
        latent = (query[..., :nope].transpose(-3, -2) @ self.key).transpose(-3, -2)
        return torch.cat((latent, query[..., nope:]), dim=-1)

    def lifted(self, output: Tensor) -> Tensor:
        """What attention to rows gives, [.., T, Hq, rank + rotated], as outputs of the heads: [.., T, Hq, V]."""
        return (output[..., : self.value.shape[2]].transpose(-3, -2) @ self.value.mT).transpose(-3, -2)

    def attention(self, query: Tensor, to_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Outputs [T, Hq, V] of queries [T, Hq, nope + rotated], by attention to rows: from and to [T, Hq, rank + rotated]."""
        return self.lifted(to_rows(self.absorbed(query)))

    def made(self, rows: Tensor) -> Tensor:
        """Keys and values [T, Hq, K|V, nope + rotated] of rows [T, 1, rank + rotated], or of stored ones, [T, 1, 1, ..].

        Values are as wide as keys, zeros behind their own numbers, as kernels of attention want them.
        """
        (heads, nope, rank), value = self.key.shape, self.value.shape[1]
        rows = rows.reshape(len(rows), -1)
        latents, width = rows[:, :rank], nope + rows.shape[1] - rank
        assert value <= width, "values wider than keys"
        made = rows.new_empty((2, heads, len(rows), width))
        made[0, :, :, :nope] = latents @ self.key.mT
        made[0, :, :, nope:] = rows[:, rank:]
        made[1, :, :, :value] = latents @ self.value.mT
        made[1, :, :, value:] = 0
        return made.permute(2, 1, 0, 3)

    def making_pays(self, queries: int, row: int) -> bool:
        """Whether so many queries read stored rows of `row` numbers with fewer operations where keys and values are made."""
        _, nope, rank = self.key.shape
        made = nope + self.value.shape[1]
        return queries * (2 * row - made - (row - rank)) > rank * made


def made_attention(latents: Latents, query: Tensor, row: Tensor, scale: float, softmax: Softmax = PLAIN) -> Tensor:
    """Causal attention of the first C tokens of a request over themselves, with keys and values that are made of their rows.

    Args:
        query: [C, Hq, nope + rotated].
        row: [C, 1, rank + rotated].

    Returns:
        [C, Hq, V].
    """
    key, value = latents.made(row).unbind(2)
    return causal_attention(query, key, value, scale, softmax)[..., : latents.value.shape[1]]
