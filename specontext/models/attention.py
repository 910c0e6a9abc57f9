"""The attention function that Hugging Face modules call: it hands q, k and v of a layer to the running step.

The step stands at the modules, not among their arguments: some modelling code does not pass unknown arguments on to its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from specontext.errors import ModelError
from specontext.kernels.latents import Latents
from specontext.kernels.softmax import PLAIN, Softmax
from specontext.layer_sizes import Place, Window
from specontext.model_shape import ModelShape
from specontext.models.latents import EXPAND, latent_modules, latents_of, rows_of_latents
from specontext.models.mixers import RUNNING, MixerCall, leave_mixers, listen_to_mixers
from specontext.models.temperature import at_positions

ATTENTION_NAME = "specontext"

# Keywords of modelling code that do not change what is computed, whatever their value.
WITHOUT_EFFECT = frozenset(
    "position_ids cache_position position_embeddings layer_idx use_cache return_dict target_dtype deterministic "
    "output_attentions output_hidden_states output_router_logits logits_to_keep num_items_in_batch".split()
)


class NoStepError(RuntimeError):
    """Attention is called without a running step."""


class LayerAttention(Protocol):
    """What a step does when a layer calls attention.

    Layers that keep KV are numbered among themselves: those that attend to the whole context, and those that have a window. A
    layer without KV of its own comes with the number of the one whose KV it reads, and with that one's keys and values.

    Attributes:
        positions: int64 [T], of the tokens of the pass; None where they are 0 .. T - 1.
    """

    @property
    def positions(self) -> Tensor | None: ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        """Store k and v [T, Hkv, D], unless they are `stored` already, and return the attention output [T, Hq, D] for q
        [T, Hq, D]; all after RoPE."""
        ...

    def attend_window(
        self,
        layer: int,
        window: Window,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        """The same in a layer that has a window."""
        ...

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        """The output [1, T, H] of a mixer, which keeps a state instead of KV, for its input [1, T, H]."""
        ...

    def attend_latents(
        self, layer: int, latents: Latents, query: Tensor, row: Tensor, scale: float, softmax: Softmax = PLAIN
    ) -> Tensor:
        """Store the rows of latents [T, 1, rank + rotated] and return the attention output [T, Hq, V] for q
        [T, Hq, nope + rotated]."""
        ...


class Running:
    """What the modules of a model share while a forward pass runs.

    Attributes:
        listener: whoever gets the layers' attention; None between two passes.
        longest: the longest context that may be asked for; None before the config has been read.
        places: of decoder layers, by number, where they find their KV.
        configs: those that say which attention function the modules call.
        serial: mixers whose code goes on with a state for one token at a time only.
        latent: attributes of the modules that have multi-head latent attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.listener: Any = None
        self.longest: int | None = None
        self.serial: set[int] = set()
        self.places: Mapping[int, Place] = {}
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        self.configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]
        self.latent = [vars(module) for module in latent_modules(model)]

    def know(self, shape: ModelShape) -> None:
        """Hear which layers have attention, and where they find their KV."""
        self.longest, self.places = shape.reach, shape.places


def running_of(model: PreTrainedModel) -> Running:
    """What the modules of a model share; made when it is first asked for."""
    running = getattr(model, RUNNING, None)
    if not isinstance(running, Running):
        running = Running(model)
        for module in model.modules():
            setattr(module, RUNNING, running)
        listen_to_mixers(model)
    return running


def forget_running(model: PreTrainedModel) -> None:
    """Take off a model what `running_of` put there."""
    for module in model.modules():
        vars(module).pop(RUNNING, None)
    leave_mixers(model)


@contextmanager
def listening(model: PreTrainedModel, listener: object, *, expanded: bool = False) -> Iterator[None]:
    """Inside, the model's layers hand their attention to `listener`.

    Args:
        expanded: of latents the keys and values that the library makes of them, and not the rows that are stored.
    """
    running = getattr(model, RUNNING, None) or running_of(model)
    before, running.listener = running.listener, listener
    exchanged = [] if expanded else [module for module in running.latent if EXPAND not in module]
    for module in exchanged:
        module[EXPAND] = rows_of_latents
    try:
        yield
    finally:
        running.listener = before
        for module in exchanged:
            del module[EXPAND]


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, the model's modules call the attention function of this name."""
    before = [(config, config._attn_implementation) for config in running_of(model).configs]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


@torch.compiler.disable
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Packed attention: query [1, Hq, T, D], key and value [1, Hkv, T, D], all of the running step.

    The name is unknown to the mask interface, so the library builds no mask: causality and boundaries are the step's.

    Raises:
        ModelError: a mask of the model's own, or a keyword that changes attention and is not understood.
    """
    running: Running | None = getattr(module, RUNNING, None)
    if running is None or running.listener is None:
        raise NoStepError("this model was loaded for SpeContext's engine: run it through specontext.LLM")
    number: Any = module.layer_idx
    if number is None:
        raise ModelError("several of its layers share one attention, which does not say whose KV it brings")
    layer, window, stored = running.places.get(number, (number, None, False))
    softmax = understood(attention_mask, options, running.longest, window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if getattr(module, "attn_temperature_tuning", False):
        query = at_positions(module, query, running.listener.positions)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if EXPAND in vars(module):
        output = running.listener.attend_latents(layer, latents_of(module), q, k, scale, softmax)
    elif window is None:
        output = running.listener.attend(layer, q, k, v, scale, softmax, stored=stored)
    else:
        output = running.listener.attend_window(layer, window, q, k, v, scale, softmax, stored=stored)
    return output[None], None


def understood(
    attention_mask: Tensor | None, options: Mapping[str, Any], longest: int | None = None, window: Window | None = None
) -> Softmax:
    """How a layer makes weights of logits, from what modelling code hands to attention beside q, k, v and scale.

    Args:
        longest: context that is served, in tokens, which a window may be as long as; None for no such bound.
        window: of this layer.

    Raises:
        ModelError: a mask of the model's own, or a keyword that changes attention and is not computed here.
    """
    if attention_mask is not None:
        raise ModelError("it hands its attention a mask of its own, and only causal attention is computed")
    for name, value in options.items():
        if name in WITHOUT_EFFECT or value is None or (name != "is_causal" and value is False):
            continue
        if name == "is_causal" and value is True:
            continue
        if name == "dropout" and value == 0:
            continue
        if name == "softcap" and isinstance(value, int | float) and value > 0:
            continue
        if name == "s_aux" and isinstance(value, Tensor):
            continue
        if name == "sliding_window" and isinstance(value, int) and _covers(value, longest, window):
            continue
        shown = f"={value}" if isinstance(value, bool | int | float | str) else ""
        raise ModelError(f"it hands its attention '{name}{shown}', which changes attention in a way that is not computed here")
    cap, sinks = options.get("softcap") or None, options.get("s_aux")
    return PLAIN if cap is None and sinks is None else Softmax(cap, sinks)


def _covers(size: int, longest: int | None, window: Window | None) -> bool:
    """Whether a window of this size is the layer's own, or as long as any context."""
    return size == window.size if window is not None else longest is not None and size >= longest


def register_attention() -> None:
    """Make the attention function known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
