"""How a layer makes weights of logits, where it is not by the plain softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Softmax:
    """What some decoders do to logits x, after the scale.

    Attributes:
        cap: logits become cap * tanh(x / cap), as in Gemma 2; None leaves them.
        sinks: [Hq], a logit more in the softmax of each query head, of a token that has no value, as in gpt-oss; None for none.
    """

    cap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.cap is None and self.sinks is None


PLAIN = Softmax()


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits under a soft cap; -inf, of what is not read, stays."""
    return logits if cap is None else torch.where(logits == -torch.inf, logits, torch.tanh(logits / cap) * cap)


def with_sinks(output: Tensor, lse: Tensor, softmax: Softmax) -> Tensor:
    """Attention in whose softmax every head's sink takes part, from attention without.

    The weights of what was read fall by the same factor: sum / (sum + e^sink), from the log-sum-exp.

    Args:
        output: [..., Hq, D].
        lse: float32 [..., Hq].
    """
    if softmax.sinks is None:
        return output
    share = torch.sigmoid(lse - softmax.sinks.float())
    return (output.float() * share[..., None]).to(output.dtype)
