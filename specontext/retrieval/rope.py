"""Rotary position embedding of a retrieval head: its frequencies and its extension by YaRN."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.errors import HeadError
from specontext.retrieval.head_config import HeadConfig


def rope_frequencies(config: HeadConfig, *, theta: float, yarn_factor: float) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [D / 2] on the CPU, and the factor of cos and sin.

    Scaled kinds are transformers' own; YaRN extends from the trained length.

    Raises:
        HeadError: RoPE parameters that are incomplete or wrong.
    """
    scaling = config.rope_scaling
    if yarn_factor > 1:
        scaling = {"rope_type": "yarn", "factor": yarn_factor, "original_max_position_embeddings": config.trained_length}
    with torch.device("cpu"):
        if scaling is None:
            plain = (theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)).float()
            if not torch.isfinite(plain).all():
                raise HeadError(f"rope_theta {theta:g} of the retrieval head gives frequencies that are not finite numbers")
            return plain, 1.0
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        try:
            form = LlamaConfig(
                hidden_size=config.heads * config.head_dim,
                num_attention_heads=config.heads,
                head_dim=config.head_dim,
                max_position_embeddings=scaling.get("original_max_position_embeddings") or config.trained_length,
                rope_parameters=scaling | {"rope_theta": theta, "factor": float(scaling["factor"])},
            )
            frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](form, torch.device("cpu"))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise HeadError(f"rope_scaling {scaling} of the retrieval head is incomplete or wrong: {error}") from error
        if not torch.isfinite(frequencies).all():
            raise HeadError(f"rope_scaling {scaling} of the retrieval head gives frequencies that are not finite numbers")
        return frequencies, float(attention_scaling)
