"""Layers that keep a state of fixed size: while somebody listens to the model, they hand their input to the running step.

A packed batch has tokens of many requests in one row, and a mixer takes a row for one sequence. So the step calls a mixer's own
code several times, with what belongs together and the states of these requests.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specontext.errors import ModelError
from specontext.memory.states import States, cache_argument, cache_of, mixers_of, states_in

RUNNING = "specontext_running"  # attribute of every module of a model that has run here
NUMBER = "specontext_mixer"  # attribute of every mixer of such a model
# Arguments of mixers that do not change what is computed.
WITHOUT_EFFECT = frozenset("position_ids cache_position position_embeddings use_cache output_attentions logits_to_keep".split())


class MixerCall:
    """A mixer that its layer has called.

    Args:
        kind: its own class.
        given: all arguments that it was called with, by name.

    Attributes:
        serial: its code goes on with a state for one token at a time only.
    """

    def __init__(self, mixer: nn.Module, kind: type[nn.Module], given: Mapping[str, Any], *, serial: bool) -> None:
        self._mixer, self._kind, self._given, self.serial = mixer, kind, given, serial
        self._layer, self._cache = int(mixer.layer_idx), cache_argument(kind)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raises ModelError for a mask, or an argument that is not understood."""
        for name, value in self._given.items():
            if name not in ("hidden_states", self._cache, *WITHOUT_EFFECT) and value is not None and value is not False:
                raise ModelError(f"it hands '{name}' to its layers without attention, and that is not understood here")

    def __call__(self, hidden: Tensor, states: States | None) -> tuple[Tensor, dict[tuple[bool, int], Tensor]]:
        """Outputs [R, T, H] for R sequences of T tokens [R, T, H] that go on from states, and the states behind them.

        Args:
            states: may be written to; None where no tokens came before.
        """
        if self.serial and states is not None and hidden.shape[1] > 1:
            outputs = []
            for token in hidden.split(1, dim=1):
                output, states = self(token, states)
                outputs.append(output)
            return torch.cat(outputs, dim=1), dict(states)
        cache = cache_of(self._layer, states)
        output = self._kind.forward(self._mixer, hidden, **{self._cache: cache})
        return output, states_in(cache, self._layer)

    def whole(self, hidden: Tensor) -> Tensor:
        """Outputs [N, S, H] for whole sequences [N, S, H]."""
        output: Tensor = self._kind.forward(self._mixer, hidden)
        return output

    def as_given(self) -> Tensor:
        """What the layer would have got from the mixer itself."""
        output: Tensor = self._kind.forward(self._mixer, **self._given)
        return output


def listen_to_mixers(model: nn.Module) -> None:
    """Have a model's mixers ask whoever listens to the model, through the attribute `RUNNING` of modules."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for number, mixer in enumerate(mixers_of(model)):
        kind = type(mixer)
        if NUMBER in vars(mixer):
            continue
        # A class and not a method at the module, which would hold the module that holds it.
        mixer.__class__ = kinds.setdefault(kind, _listening(kind))
        setattr(mixer, NUMBER, number)


def leave_mixers(model: nn.Module) -> None:
    """Take back what `listen_to_mixers` did."""
    for module in model.modules():
        if vars(module).pop(NUMBER, None) is not None:
            module.__class__ = type(module).__mro__[1]


def _listening(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a mixer that asks the listener, if there is one."""
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]

    @torch.compiler.disable
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        running = vars(self).get(RUNNING)
        if running is None or running.listener is None:
            return kind.forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        number = vars(self)[NUMBER]
        call = MixerCall(self, kind, given, serial=number in running.serial)
        return running.listener.mix(number, given["hidden_states"], call)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})
