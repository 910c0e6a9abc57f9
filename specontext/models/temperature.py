"""Attention temperature that follows a token's position, where modelling code takes the position from the library's cache.

In layers without RoPE, Llama 4 multiplies queries by log(1 + floor((position + 1) / floor_scale)) * attn_scale + 1. It counts
positions from what the library's cache holds; the engine gives it none, and several requests in one row. So the factor is
exchanged here for the one that the tokens' own positions ask for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_positions(module: nn.Module, query: Tensor, positions: Tensor | None) -> Tensor:
    """Queries [..., T, D] of an attention module as they are at these positions.

    Args:
        positions: integers of any shape that broadcasts to [..., T]; None where they are 0 .. T - 1, for which all is right.
    """
    tuned = getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True)
    if positions is None or not tuned:
        return query
    counted = torch.arange(query.shape[-2], device=query.device)
    factor = _factor(module, positions) / _factor(module, counted)
    return (query * factor[..., None]).to(query.dtype)


def _factor(module: nn.Module, positions: Tensor) -> Tensor:
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)  # type: ignore[operator]
    return torch.log1p(steps) * module.attn_scale + 1.0  # type: ignore[operator]
