"""Taps on a decoder's hidden states: the features that an EAGLE-3 head reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specontext.models.decoder import decoder_layers


class FeatureTaps:
    """Forward hooks that keep hidden states between decoder layers during one forward pass.

    Feature layer l is Hugging Face's `hidden_states[l]`: the input of layer l. l = L is the output of the last layer, before
    the final norm. Where a model carries several states of a token between its layers (Gemma 3n), it is the one that layers
    attend with.

    Attributes:
        watching: else hidden states pass by; for a model that runs outside of engines too.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.watching = True
        self._taken: dict[int, Tensor] = {}
        self._active = getattr(model.config, "altup_active_idx", 0)
        modules = decoder_layers(model)
        last = len(modules)
        self._handles = [
            modules[layer].register_forward_pre_hook(self._keep(layer), with_kwargs=True) for layer in self.layers if layer < last
        ]
        if last in self.layers:
            self._handles.append(modules[-1].register_forward_hook(self._keep_output(last)))

    def _keep(self, layer: int):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            if self.watching:
                self._taken[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _keep_output(self, layer: int):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
            if self.watching:
                self._taken[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def take(self) -> Tensor:
        """Features of the last forward pass, [N, T, len(layers) * hidden], in the order the layers were named."""
        taken = [self._taken[layer] for layer in self.layers]
        features = torch.cat([states[self._active] if states.dim() == 4 else states for states in taken], dim=-1)
        self._taken.clear()
        return features

    def remove(self) -> None:
        """Take the hooks off the model; doing so again changes nothing."""
        for handle in self._handles:
            handle.remove()
        self._taken.clear()
