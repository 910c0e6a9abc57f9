"""Run one packed batch through selection, model and observation."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Batch
from specontext.engine.build import Parts
from specontext.engine.step import Step
from specontext.models.features import FeatureTaps
from specontext.models.loading import LoadedModel


class ModelRunner:
    """The model step.

    Args:
        feature_layers: hidden states that the selector wants to observe, empty for none.
    """

    def __init__(self, loaded: LoadedModel, parts: Parts, *, feature_layers: tuple[int, ...], measure_recall: bool) -> None:
        self.loaded, self.parts, self.measure_recall = loaded, parts, measure_recall
        self.taps = FeatureTaps(loaded.model, feature_layers) if feature_layers else None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits of the last token of every request, [requests, V]."""
        parts = self.parts
        step = Step(batch, parts.kv, parts.selector, parts.meter, measure_recall=self.measure_recall)
        step.begin()
        output = self.loaded.model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.last_tokens,
            specontext_step=step,
        )
        step.end()
        parts.selector.observe(batch, self.taps.take()[0] if self.taps is not None else None)
        return output.logits[0]

    def close(self) -> None:
        """Take the feature taps off the model."""
        if self.taps is not None:
            self.taps.remove()
