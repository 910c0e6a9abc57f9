"""The parts of a decoder, found by what they do: architectures name them as they like."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from specontext.errors import ModelError


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model below the output layer, from token ids to states after the last norm."""
    found: Any = model.get_decoder()
    if found is model:  # a class whose parts have other names than the library supposes
        found = next(part for part in model.children() if isinstance(part, PreTrainedModel))
    return found


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers in their order: the list of modules whose l-th one owns the attention of layer l. Others may follow them.

    What the last of them returns goes into the final norm, so no name of that norm is needed.

    Raises:
        ModelError: there is no such list.
    """
    count = model.config.num_hidden_layers
    for modules in decoder_of(model).modules():
        if isinstance(modules, nn.ModuleList) and len(modules) >= count:
            layers = list(modules)[:count]
            owned = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in layers]
            if owned == [{index} for index in range(count)]:
                return layers
    raise ModelError(f"{type(model).__name__} is not supported: its {count} layers do not stand in one list")


def output_layer(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its decoder, sharing its weights: whatever it does to turn states into logits is done.

    It is called with `inputs_embeds` [N, T, H], what the decoder would return.
    """
    decoder = decoder_of(model)
    *parents, last = next(name for name, module in model.named_modules() if module is decoder).split(".")
    whole = copy.copy(model)
    inner: nn.Module = whole
    for name in parents:
        part = copy.copy(inner.get_submodule(name))
        inner._modules = inner._modules | {name: part}
        inner = part
    inner._modules = inner._modules | {last: _Given(decoder)}
    return whole


@dataclass
class _Output(MoeModelOutputWithPast):
    """Has the fields of all decoders' outputs."""

    cross_attentions: None = None
    shared_kv_states: None = None


class _Given(nn.Module):
    """Stands where a model's decoder stands: what goes in comes out. It has the decoder's numbers, such as factors of logits."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(decoder).items() if isinstance(value, int | float)})

    def forward(self, *_: Any, inputs_embeds: Any, **__: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)
