"""A step in layers that keep a state instead of KV: decode tokens in one call, each chunk of a prompt in one of its own.

States are gathered by seat, handed to the layer's own code, and scattered again, so that batch mates never meet and a captured
step serves whatever seats there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Batch
from specontext.kv.states import SeatStates
from specontext.models.mixers import MixerCall


class StatefulStep:
    """One packed batch in the mixers.

    Args:
        keep: states behind the step's tokens are stored; else the step leaves no trace.
    """

    def __init__(self, batch: Batch, states: SeatStates, *, keep: bool) -> None:
        self._batch, self._states, self._keep = batch, states, keep
        if not batch.prefills:
            states.clear_padding()

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        """See `LayerAttention.mix`."""
        call.check()
        decodes, parts = self._batch.num_decodes, []
        if decodes:
            seats = self._batch.seats[:decodes]
            output = self._run(mixer, hidden[0, :decodes, None], call, seats, begins=False)  # [R, 1, H]
            parts.append(output.transpose(0, 1))
        for segment in self._batch.prefills:
            part = slice(segment.offset, segment.offset + segment.length)
            seats = self._batch.seats[segment.offset : segment.offset + 1]
            parts.append(self._run(mixer, hidden[:, part], call, seats, begins=segment.start == 0))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run(self, mixer: int, hidden: Tensor, call: MixerCall, seats: Tensor, *, begins: bool) -> Tensor:
        output, states = call(hidden, None if begins else self._states.of(mixer, seats))
        if self._keep:
            self._states.put(mixer, seats, states)
        return output
