"""Do a model's mixers compute here what they compute in the library, and do they go on with a state?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.errors import ModelError
from specontext.memory.states import States
from specontext.models.mixers import MixerCall
from specontext.models.tolerance import differ, of_outputs

LOUD = 16  # by which states are enlarged, so that what comes of them is most of an output


@dataclass(frozen=True, eq=False)
class _Mixed:
    """What a mixer has got and given so far: its input and output [1, T, H], and the states behind them."""

    hidden: Tensor
    output: Tensor
    states: States


class MixersSeen:
    """What the mixers of a model have computed in a first pass, and whether they compute it again in a second.

    Attributes:
        serial: those whose code goes on with a state for one token at a time only.
    """

    def __init__(self) -> None:
        self.serial: set[int] = set()
        self._seen: dict[int, _Mixed] = {}
        self._compared: dict[int, int] = {}  # tokens

    def see(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        """The output of a mixer that goes on from the chunk before, once it has been found equal to that for all tokens at once.

        The last token goes alone, as when it is decoded.

        Raises:
            ModelError: it is not.
        """
        call.check()
        past = self._seen.get(mixer)
        if past is None:
            output, states = call(hidden, None)
            self._seen[mixer] = _Mixed(hidden, output, states)
            return output
        together, states, parts = torch.cat((past.hidden, hidden), dim=1), _scaled(past.states, 1), []
        if not _goes_on(call, hidden, past.states):
            self.serial.add(mixer)
        call.serial = mixer in self.serial
        for part in hidden.split([hidden.shape[1] - 1, 1], dim=1):
            output, states = call(part, states)
            parts.append(output)
        output = torch.cat(parts, dim=1)
        if differ(output, call.whole(together)[:, -hidden.shape[1] :], of_outputs(hidden)):
            raise ModelError(
                "a layer without attention gives other results for two chunks of a text than for both, so no state can be kept"
            )
        self._seen[mixer] = _Mixed(together, torch.cat((past.output, output), dim=1), states)
        return output

    def compare(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        """What the layer shall go on with in the second pass: the output of the first.

        Raises:
            ModelError: the library's differs.
        """
        begin = self._compared.get(mixer, 0)
        self._compared[mixer] = stop = begin + hidden.shape[1]
        ours, theirs = self._seen[mixer].output[:, begin:stop], call.as_given()
        serial = mixer in self.serial and begin > 0  # such code does not go on with a chunk in the library either
        if not serial and differ(ours, theirs, of_outputs(hidden)):
            raise ModelError("a layer without attention gives other results here than in the library")
        return ours


def _scaled(states: States, factor: int) -> dict[tuple[bool, int], Tensor]:
    return {kind: state * factor for kind, state in states.items()}


def _goes_on(call: MixerCall, hidden: Tensor, states: States) -> bool:
    """Whether a mixer's code takes states into account for a chunk as it does for one token after the other.

    They are enlarged: with those of a few tokens, code that ignored them might differ by less than rounding does.
    """
    results = []
    for serial in (False, True):
        call.serial = serial
        results.append(call(hidden, _scaled(states, LOUD)))
    (chunk, behind), (each, behind_each) = results
    tolerance = of_outputs(hidden)
    return not (differ(chunk, each, tolerance) or any(differ(behind[kind], behind_each[kind], tolerance) for kind in behind_each))
