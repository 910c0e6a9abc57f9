"""Multi-head latent attention: a token's keys and values in all heads are linear maps of one latent, which is all that is stored.

    key of head h    = [ A_h latent | rotated ]        rotated: the part that RoPE turns, which all heads share
    value of head h  = B_h latent

So attention can be computed in latent space, as attention of all query heads to one KV head whose rows [latent | rotated] are
key and value at once: q_h A_h is a query for latents, and the weighted sum of latents becomes the head's output by B_h (the
absorbed form of DeepSeek-V2, arXiv 2405.04434). A step that decodes reads each row once for all heads then. Of a pair of a query
and a stored token it costs 4 (rank + rotated) operations a head, and 2 (key + value) where keys and values were made first; making
those of a token costs 2 rank (key + value) a head. So for many queries they are made, tile by tile: see `expanding_pays`.
"""

from __future__ import annotations

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

    @property
    def rank(self) -> int:
        return self.key.shape[2]

    @property
    def unturned(self) -> int:
        """Numbers of a key or query that RoPE does not turn."""
        return self.key.shape[1]

    def absorbed(self, query: Tensor) -> Tensor:
        """Queries [.., Hq, T, nope + rotated] as queries for rows: [.., Hq, T, rank + rotated]."""
        return torch.cat((query[..., : self.unturned] @ self.key, query[..., self.unturned :]), dim=-1)

    def lifted(self, output: Tensor) -> Tensor:
        """What attention to rows gives, [.., Hq, T, rank + rotated], as outputs of the heads: [.., Hq, T, V]."""
        return output[..., : self.rank] @ self.value.mT

    def made(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [.., Hq, T, nope + rotated] and values [.., Hq, T, V] of rows [.., 1, T, rank + rotated]."""
        latents, rotated = rows[..., : self.rank], rows[..., self.rank :]
        heads = (*rows.shape[:-3], self.key.shape[0], *rows.shape[-2:-1])
        return torch.cat((latents @ self.key.mT, rotated.expand(*heads, -1)), dim=-1), latents @ self.value.mT

    def expanding_pays(self, queries: int, rotated: int) -> bool:
        """Whether so many queries read stored tokens with fewer operations where keys and values are made of them."""
        made = self.unturned + rotated + self.value.shape[1]
        return queries * (2 * (self.rank + rotated) - made) > self.rank * (made - rotated)


def made_attention(latents: Latents, query: Tensor, row: Tensor, scale: float, softmax: Softmax = PLAIN) -> Tensor:
    """Causal attention of the first C tokens of a request over themselves, with keys and values that are made of their rows.

    Args:
        query: [C, Hq, nope + rotated].
        row: [C, 1, rank + rotated].

    Returns:
        [C, Hq, V].
    """
    key, value = latents.made(row.transpose(0, 1))
    return causal_attention(query, key.transpose(0, 1), _padded(value, key).transpose(0, 1), scale, softmax)[..., : value.shape[-1]]


def _padded(value: Tensor, key: Tensor) -> Tensor:
    """Values as wide as keys, as attention kernels want them."""
    return torch.nn.functional.pad(value, (0, key.shape[-1] - value.shape[-1]))
