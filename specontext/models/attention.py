"""The attention function that Hugging Face modules call: it hands q, k and v of a layer to the running step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "specontext"


class NoStepError(RuntimeError):
    """Attention is called without a running step."""


class LayerAttention(Protocol):
    """What a step does when a layer calls attention."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store k and v [T, Hkv, D] and return the attention output [T, Hq, D] for q [T, Hq, D]; all after RoPE."""
        ...


@torch.compiler.disable
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    specontext_step: LayerAttention | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Packed attention: query [1, Hq, T, D], key and value [1, Hkv, T, D]; the running step comes as a keyword argument.

    The name is unknown to the mask interface, so no mask is ever built: causality and boundaries are the step's.
    """
    if specontext_step is None:
        raise NoStepError("this model was loaded for SpeContext's engine: run it through specontext.LLM")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output = specontext_step.attend(module.layer_idx, q, k, v, scale)  # type: ignore[arg-type]
    return output[None], None


def register_attention() -> None:
    """Make the attention function known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
