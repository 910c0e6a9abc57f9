"""Norms of queries and keys that know the heads: of which numbers ranks have those of their own heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from specontext.errors import ModelError
from specontext.models.rank_heads import Heads
from specontext.models.split_styles import COLUMNS, NORM_OF_ALL_HEADS

PROJECTIONS = {"q_norm": "q_proj", "q_layernorm": "q_proj", "k_norm": "k_proj", "k_layernorm": "k_proj"}  # what norms get


def style_of_norm(layer: nn.Module, path: str, table: Tensor, heads: Heads) -> str | None:
    """How a norm's table is split; None where it is none of such a norm.

    Args:
        path: of a module.

    Raises:
        ModelError: a norm over all heads that is another one than by the root mean square.
    """
    parent, _, name = path.rpartition(".")
    projection = getattr(layer.get_submodule(parent), PROJECTIONS.get(name, ""), None)
    if not isinstance(projection, nn.Linear):
        return None
    width, count = projection.out_features, heads.kv if name.startswith("k") else heads.query
    if tuple(table.shape) == (count, width // count):
        return COLUMNS
    if count == 1 or tuple(table.shape) != (width,):
        return None
    norm = layer.get_submodule(path)
    if not _is_by_root_mean_square(norm, width):
        raise ModelError(f"nothing says how its {path} is split, a {type(norm).__name__} over all heads")
    return NORM_OF_ALL_HEADS


def eps_of(norm: nn.Module) -> float:
    """What a norm adds to the mean square."""
    found: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(found or 0.0)


@torch.no_grad()
def _is_by_root_mean_square(norm: nn.Module, width: int) -> bool:
    """Whether a norm makes of x what `NormOfAllHeads` makes of it. Its own weights may lack memory."""
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    eps, chance = eps_of(norm), torch.Generator().manual_seed(0)
    weight, x = torch.randn((2, width), generator=chance)
    x = x * max(eps, 1e-12) ** 0.5  # so small that eps counts
    expected = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
    found = functional_call(norm, {"weight": weight}, (x[None],))[0]
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
