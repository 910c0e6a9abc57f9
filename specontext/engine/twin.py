"""The dense twin of a step: what decode tokens would attend to with full attention, known before they are processed.

For methods that analyse what selections could reach; nothing that serves needs it, since it costs all that selecting saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specontext.core import Batch
from specontext.engine.decode import Step
from specontext.engine.lanes import RunningLane
from specontext.engine.methods import Methods
from specontext.engine.parts import Parts
from specontext.engine.statistics import Meter
from specontext.models.attention import listening
from specontext.models.decoder import decoder_of
from specontext.models.loading import LoadedModel
from specontext.retrieval.methods.full import FullSelector
from specontext.retrieval.registry import FULL
from specontext.retrieval.selector import ForeseeingSelector, LaneTokens, MethodContext


class DenseTwin:
    """Runs decode tokens with full attention ahead of their step and shows their weights to the methods that foresee.

    The K and V that it stores for a token are replaced when the step stores its own, and states stay as they are. Its steps are
    not counted: a method says in `selection_bytes` what it has read here.
    """

    def __init__(self, loaded: LoadedModel, parts: Parts) -> None:
        self.loaded, self.kv = loaded, parts.kv
        shape, device, seats = loaded.shape, parts.kv.device, parts.kv.num_seats
        full = FullSelector(MethodContext(shape, parts.methods.budget, "head", seats, parts.max_tokens, device))
        self._methods = Methods(FULL, parts.methods.budget, {FULL: full}, layout=parts.kv.layout, device=device)
        self._meter = Meter(shape, full.head_map, tables=1, groups=1, budget=1, sink=0, seats=seats, device=device)

    def look_ahead(self, batch: Batch, lanes: Sequence[RunningLane]) -> None:
        """Show every layer's attention of the decode tokens of these ways to their selectors."""
        device = batch.token_ids.device
        index = torch.cat([torch.arange(lane.part.start, lane.part.stop, device=device) for lane in lanes])
        for lane in lanes:
            assert isinstance(lane.selector, ForeseeingSelector)
            lane.selector.look_anew()
        sizes = [lane.part.stop - lane.part.start for lane in lanes]

        def show(layer: int, _: LaneTokens, weights: Tensor, __: Tensor | None) -> None:
            for lane, part in zip(lanes, weights.split(sizes), strict=True):
                assert isinstance(lane.selector, ForeseeingSelector)
                lane.selector.foresee(layer, part[..., : lane.decode.span])

        tokens = (batch.token_ids[index], batch.positions[index], batch.seats[index], batch.lengths[index], batch.seeds[index])
        last = torch.arange(len(index), device=device)
        twin = Batch(*tokens, len(index), (), last, span=max(lane.decode.span for lane in lanes))
        step = Step(twin, self.kv, self._methods, self._meter, measure_recall=True, observer=show, keep_states=False)
        try:
            step.begin()
            with listening(self.loaded.model, step):
                # Not as a call: whoever looks at what leaves the decoder means the step itself.
                decoder = decoder_of(self.loaded.model)
                decoder.forward(input_ids=twin.token_ids[None], position_ids=twin.positions[None], use_cache=False)
            step.end()
        finally:
            vars(step).clear()
