"""Modules with multi-head latent attention: what they hand to attention while somebody listens are latents.

The library's modules make keys and values of all heads from latents by their method `expand_kv`, right before attention. While a
pass is listened to, a function stands in its place at each such module, which hands on the rows themselves: all that is stored.
Outside of such a pass nothing is changed. Projections, norms, RoPE and the scale are the module's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specontext.kernels.latents import Latents

EXPAND = "expand_kv"  # of the library's modules


def latent_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that have multi-head latent attention, in their order."""
    return [module for module in model.modules() if hasattr(type(module), EXPAND)]


def rows_of_latents(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Stands where `expand_kv` stands: latents [N, 1, S, rank] and the part of keys that RoPE has turned, as rows, which are key
    and value at once."""
    row = torch.cat((latent, rotated), dim=-1)
    return row, row


def latents_of(module: nn.Module) -> Latents:
    """How a module makes keys and values, as views of its weights."""
    weight: Tensor = module.kv_b_proj.weight  # type: ignore[union-attr, assignment]
    unturned, value = int(module.qk_nope_head_dim), int(module.v_head_dim)  # type: ignore[arg-type]
    heads = weight.view(-1, unturned + value, weight.shape[1])
    return Latents(heads[:, :unturned], heads[:, unturned:])
