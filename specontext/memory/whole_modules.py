"""The modules of a decoder of which every rank has the whole, beside norms, routers and embeddings."""

from __future__ import annotations

from torch import nn

from specontext.memory.states import mixers_of

LATENTS = ("q_a_proj", "kv_a_proj_with_mqa", "fc1_latent_proj", "fc2_latent_proj")  # what makes them, and takes experts' in
# Of Gemma 3n and 4: what mixes states of a token and inputs of single layers into the stream.
NARROW: tuple[str, ...] = ("altup", "altup_projections", "altup_unembed_projections", "laurel")
NARROW += ("per_layer_input_gate", "per_layer_model_projection", "per_layer_projection")


def whole_modules(model: nn.Module) -> list[nn.Module]:
    """What keeps a state, what makes latents, what is too narrow to be worth a sum over ranks, and feed-forward layers in which
    the mean of all numbers decides which of them count."""
    named = [module for name, module in model.named_modules() if name.rpartition(".")[2] in LATENTS + NARROW]
    choosing = [module for module in model.modules() if getattr(module, "activation_sparsity", 0)]
    return mixers_of(model) + named + choosing
