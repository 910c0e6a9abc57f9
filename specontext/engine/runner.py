"""Run one packed batch through selection, model and observation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from specontext.core import Batch
from specontext.engine.build import Parts
from specontext.engine.chunk_warm_up import warm_up_chunks
from specontext.engine.decode import Step
from specontext.engine.graphs import DecodeGraphs
from specontext.engine.true_attention import AttentionObserver
from specontext.engine.twin import DenseTwin
from specontext.errors import DeviceError, DeviceMemoryError
from specontext.models.attention import listening
from specontext.models.compiled import CompiledModules
from specontext.models.decoder import decoder_layers, output_layer
from specontext.models.features import FeatureTaps
from specontext.models.loading import LoadedModel
from specontext.retrieval.head import CALLED
from specontext.retrieval.selector import AheadSelector, ForeseeingSelector, Selector


class ModelRunner:
    """The model step.

    Args:
        feature_layers: hidden states that the selector wants to observe, empty for none.
        graphs: decode steps are captured as CUDA graphs, on a GPU.
        compiled: layers and head of captured steps and of chunks of prompts go through torch.compile. Not in float32, where
            tokens are promised to be those of eager steps.

    Attributes:
        observer: sees the attention of decode tokens, where recall is measured.
        captures: steps may run as captured graphs, into which nobody can look.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        parts: Parts,
        *,
        feature_layers: tuple[int, ...],
        measure_recall: bool,
        graphs: bool = True,
        compiled: bool = True,
    ) -> None:
        self.loaded, self.parts, self.measure_recall = loaded, parts, measure_recall
        self.observer: AttentionObserver | None = None
        self.taps = FeatureTaps(loaded.model, feature_layers) if feature_layers else None
        if self.taps is not None:  # the model may live on, and nobody has to call `close`
            weakref.finalize(self, self.taps.remove).atexit = False
        kv = parts.kv
        foreseeing = any(isinstance(one, ForeseeingSelector) for one in parts.methods.selectors.values())
        self._look_ahead = DenseTwin(loaded, parts).look_ahead if foreseeing else None
        self._compiled: CompiledModules | None = None
        if compiled and loaded.shape.dtype != torch.float32:
            compiling = [(layer, "forward") for layer in decoder_layers(loaded.model)]
            if parts.head is not None:
                compiling += [(parts.head, name) for name in CALLED]
            self._compiled = CompiledModules(compiling)
        self._output_layer = output_layer(loaded.model)
        self._graphs: DecodeGraphs | None = None
        if graphs and kv.device.type == "cuda" and not (measure_recall or kv.transfers.verify):
            self._graphs = DecodeGraphs(seats=kv.num_seats, max_tokens=parts.max_tokens, device=kv.device)
        self.captures = self._graphs is not None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits of the last token of every request, [requests, V]; valid until the next run.

        Raises:
            DeviceMemoryError: the device is out of memory.
            DeviceError: it has failed.
        """
        with working_device(len(batch.token_ids)):
            if self._graphs is not None and self._capturable(batch):
                if self._graphs.takes(batch):
                    return self._graphs.run(batch, self._fused)
                self._graphs.meet(batch)
            return self._uncaptured(batch)

    def captured(self, batch: Batch) -> bool:
        """Whether a batch runs as a captured graph."""
        return self._graphs is not None and self._capturable(batch) and self._graphs.takes(batch)

    def _capturable(self, batch: Batch) -> bool:
        """Whether a batch has decode tokens only, whose requests choose alike, and nothing in its step waits for the host."""
        if batch.prefills or len(batch.lanes) > 1:
            return False
        return not self._waits(self.parts.methods.of(batch.lanes[0].choice if batch.lanes else None))

    def _waits(self, selector: Selector) -> bool:
        """Whether decode steps of a method need the host, or rows that are streamed in from it."""
        streamed = not isinstance(selector, AheadSelector) and not all(self.parts.kv.resident)
        return streamed or selector.asks_host or isinstance(selector, ForeseeingSelector)

    @torch.inference_mode()
    def run_with_states(self, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`run` of a batch with prompt chunks, and what enters the output layer at packed positions int64 [E].

        Returns:
            Logits of the last tokens, [requests, V], and states [E, H], for `logits_of`.
        """
        assert batch.prefills, "decode steps may be captured, and hooks would not see them"
        kept: list[Tensor] = []
        handle = self.loaded.model.get_decoder().register_forward_hook(lambda _, __, output: kept.append(output[0][0, positions]))
        try:
            return self.run(batch), kept[0]
        finally:
            handle.remove()

    @torch.inference_mode()
    def logits_of(self, states: Tensor) -> Tensor:
        """Logits [E, V] of states [E, H] that `run_with_states` gave.

        Raises:
            DeviceMemoryError: the device is out of memory.
        """
        with working_device(len(states)):
            logits: Tensor = self._output_layer(inputs_embeds=states[None], use_cache=False).logits[0]
            return logits

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture decode steps of all sizes now, rather than when the first requests need them, and prepare chunks of prompts;
        nothing to do on a CPU."""
        if self._graphs is not None:
            warm_up_chunks(self._uncaptured, self.parts)  # first: what several tokens run is compiled with many in mind
        if self._graphs is not None and not self._waits(self.parts.selector):
            self._graphs.warm_up(self._fused)

    def _uncaptured(self, batch: Batch) -> Tensor:
        """A pass outside of graphs, compiled where prompts are computed and steps may be captured."""
        return self._fused(batch) if batch.prefills and self._graphs is not None else self._forward(batch)

    def _fused(self, batch: Batch) -> Tensor:
        fused: AbstractContextManager[None] = nullcontext()
        if self._compiled is not None:
            fused = self._compiled.use(len(batch.token_ids))
        with fused:
            return self._forward(batch)

    def _forward(self, batch: Batch) -> Tensor:
        parts = self.parts
        step = Step(
            batch,
            parts.kv,
            parts.methods,
            parts.meter,
            measure_recall=self.measure_recall,
            observer=self.observer,
            look_ahead=self._look_ahead,
        )
        try:
            step.begin()
            with listening(self.loaded.model, step):
                output = self.loaded.model(
                    input_ids=batch.token_ids[None],
                    position_ids=batch.positions[None],
                    use_cache=False,
                    logits_to_keep=batch.last_tokens,
                )
            step.end()
        finally:
            step.close()
        features = self.taps.take()[0] if self.taps is not None else None
        for selector in parts.methods.observers:
            selector.observe(batch, features)
        if batch.prefills:
            parts.prefix.observe(batch, features)
        logits: Tensor = output.logits[0]
        return logits

    def close(self) -> None:
        """Take the feature taps off the model and give back the memory of captured and compiled steps."""
        if self.taps is not None:
            self.taps.remove()
        if self._graphs is not None:
            self._graphs.close()
        self._compiled = None


@contextmanager
def working_device(tokens: int) -> Iterator[None]:
    """Says in words what goes wrong on the device inside. A GPU's failure is seen by whoever waits for it next, or by Triton.

    Args:
        tokens: of the step; 0 between two steps.

    Raises:
        DeviceMemoryError: the device is out of memory.
        DeviceError: it has failed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        where = f" in a step of {tokens} tokens" if tokens else ""
        raise DeviceMemoryError(
            f"the device ran out of memory{where} ({str(error).splitlines()[0]}): lower --max-num-batched-tokens or "
            "--gpu-memory-utilization"
        ) from error
    except RuntimeError as error:
        if not isinstance(error, torch.AcceleratorError) and "Triton Error [CUDA]" not in str(error):
            raise
        raise DeviceError(f"the GPU has failed ({str(error).splitlines()[0]}): start the engine again") from error
