"""What layers keep of a request in a fixed size: states of linear attention and state-space models, inputs of convolutions.

Modules that keep a state (*mixers*) are found by what they do, and how much it is by running them, which needs no weights: on the
device `meta` they are run without memory. Their code is the library's, and gets the library's own layer of a cache, in which
the states are the caller's tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from specontext.layer_sizes import StateTensor

WRITES = {"update_conv_state", "update_recurrent_state"}  # methods of a cache that only mixers call
CACHES = ("cache", "cache_params", "past_key_values")  # names that a cache has among their arguments

States = Mapping[tuple[bool, int], Tensor]  # of one mixer by `StateTensor.recurrent` and `StateTensor.index`, [R, ...]


def mixers_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that keep a state, in the order of its layers."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and _keeps_state(type(module))]


def _keeps_state(kind: type[nn.Module]) -> bool:
    methods = (inspect.unwrap(one) for parent in kind.__mro__ for one in vars(parent).values() if inspect.isfunction(one))
    return any(WRITES.intersection(method.__code__.co_names) for method in methods)


def cache_argument(kind: type[nn.Module]) -> str:
    """The name of a mixer's argument that takes a cache."""
    names = inspect.signature(kind.forward).parameters
    return next(name for name in CACHES if name in names)


def cache_of(layer: int, states: States | None) -> Cache:
    """A cache in which one layer has a state: tokens before, or none where `states` is None."""
    kept = LinearAttentionLayer()
    for (recurrent, index), state in (states or {}).items():
        _fill(kept, "recurrent_states" if recurrent else "conv_states", index, state)
    return Cache(layers=[kept] * (layer + 1))


def _fill(kept: Any, name: str, index: int, state: Tensor) -> None:
    if not isinstance(kept.conv_states, dict):  # former versions have one state of each kind
        setattr(kept, name, state)
        setattr(kept, f"is_{name}_initialized", True)
        kept.has_previous_state = True
    else:
        getattr(kept, name)[index] = state
        getattr(kept, f"is_{name}_initialized")[index] = True
        kept.has_previous_state[index] = True
    if name == "conv_states":
        kept.dtype, kept.device = state.dtype, state.device
        width = state.shape[-1]
        kept.conv_kernel_size = {**kept.conv_kernel_size, index: width} if hasattr(kept, "conv_kernel_size") else width


def states_in(cache: Cache, layer: int) -> dict[tuple[bool, int], Tensor]:
    """What a mixer has left in the cache that it was given."""
    kept: Any = cache.layers[layer]
    found: dict[tuple[bool, int], Tensor] = {}
    for recurrent, states in ((False, kept.conv_states), (True, kept.recurrent_states)):
        for index, state in states.items() if isinstance(states, dict) else ((0, states),):
            if state is not None:
                found[recurrent, index] = state
    return found


@torch.no_grad()
def measured_states(model: PreTrainedModel) -> tuple[StateTensor, ...]:
    """The states of a model's mixers, from a pass of two tokens through each of them.

    Raises:
        Exception: whatever modelling code raises that cannot run so.
    """
    found = []
    for number, mixer in enumerate(mixers_of(model)):
        layer, device = int(mixer.layer_idx), next(mixer.parameters()).device  # type: ignore[arg-type]
        hidden = torch.zeros((1, 2, model.config.hidden_size), dtype=model.dtype, device=device)
        cache = cache_of(layer, None)
        type(mixer).forward(mixer, hidden, **{cache_argument(type(mixer)): cache})
        for (recurrent, index), state in sorted(states_in(cache, layer).items()):
            found.append(StateTensor(number, recurrent, index, tuple(state.shape[1:]), state.dtype))
    return tuple(found)
