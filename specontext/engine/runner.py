"""Run one packed batch through selection, model and observation."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from specontext.core import Batch, Choice, Lane
from specontext.engine.batch_parts import Part, joined, lane_part, rest_part
from specontext.engine.capturable import why_not_captured
from specontext.engine.chunk_graphs import ChunkGraphs
from specontext.engine.chunk_warm_up import warm_up_chunks
from specontext.engine.decode import Step
from specontext.engine.graphs import DecodeGraphs, span_buckets
from specontext.engine.parts import Parts
from specontext.engine.true_attention import AttentionObserver
from specontext.engine.twin import DenseTwin
from specontext.errors import DeviceError, DeviceMemoryError
from specontext.kernels.compiling import Compilers
from specontext.kernels.token_choice import choose_in_every_way
from specontext.models.attention import listening
from specontext.models.compiled import CompiledModules
from specontext.models.decoder import decoder_layers, decoder_of, output_layer
from specontext.models.features import FeatureTaps
from specontext.models.loading import LoadedModel
from specontext.models.rank_layers import gathers
from specontext.retrieval.head import CALLED
from specontext.retrieval.selector import AheadSelector, ForeseeingSelector, Selector

logger = logging.getLogger("specontext")
MOST_CAPTURED = 8  # lanes of a step that run as captured steps one after the other: each reads the weights again


class ModelRunner:
    """The model step.

    Args:
        feature_layers: hidden states that the selector wants to observe, empty for none.
        graphs: decode steps are captured as CUDA graphs, on a GPU, unless the model's code waits for the device.
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
        self._ranks = loaded.ranks if not gathers(loaded.model) else None  # that may round logits otherwise than rank 0
        self._graphs: DecodeGraphs | None = None
        if graphs and kv.device.type == "cuda" and not (measure_recall or kv.transfers.verify):
            why = why_not_captured(loaded)
            if why is None:
                self._graphs = DecodeGraphs(seats=kv.num_seats, device=kv.device)
            else:
                logger.warning(
                    "steps are launched kernel by kernel, slower than captured ones, because the model waits for the GPU (%s): "
                    "mixtures of experts do in float32, and not with --dtype bfloat16",
                    why,
                )
        self.captures = self._graphs is not None
        self._chunks: ChunkGraphs | None = None
        if self._graphs is not None and parts.captures_chunks:
            self._chunks = ChunkGraphs(min(parts.step_tokens.alone, parts.max_tokens), kv.device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits of the last token of every request, [requests, V]; valid until the next run.

        Decode tokens that choose alike run as a captured step where there are any, and what is left, such as the chunks of a
        mixed step, as one packed forward pass behind them. Reading the weights again costs less than launching a step's kernels.

        Raises:
            DeviceMemoryError: the device is out of memory.
            DeviceError: it has failed.
        """
        with working_device(len(batch.token_ids)):
            return self._forward(batch) if self._graphs is None else self._run_parts(batch, self._graphs, None)[0]

    @torch.inference_mode()
    def run_with_states(self, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`run` of a batch with prompt chunks, and what enters the output layer at packed positions int64 [E] of chunks.

        Returns:
            Logits of the last tokens, [requests, V], and states [E, H], for `logits_of`.
        """
        assert batch.prefills, "decode steps may be captured, and hooks would not see them"
        with working_device(len(batch.token_ids)):
            if self._graphs is None:
                logits, states = self._run_uncaptured(batch, positions)
            else:
                logits, states = self._run_parts(batch, self._graphs, positions)
        assert states is not None
        return logits, states

    def captured_rows(self, batch: Batch) -> list[int]:
        """Which requests of a batch run as captured steps."""
        lanes = self._captured_lanes(batch, self._graphs) if self._graphs is not None else []
        return [row for lane in lanes for row in range(lane.start, lane.stop)]

    def _captured_lanes(self, batch: Batch, graphs: DecodeGraphs) -> list[Lane]:
        """The lanes of decode tokens that run as captured steps; none where they are too many to read the weights for each."""
        lanes = [lane for lane in batch.lanes if self._capturable(lane) and graphs.takes(lane, self._span(lane))]
        return lanes if len(lanes) <= MOST_CAPTURED else []

    def _capturable(self, lane: Lane) -> bool:
        """Whether nothing in the step of a lane's decode tokens waits for the host."""
        return not self._waits(self.parts.methods.of(lane.choice))

    def _spans(self, choice: Choice | None) -> list[int]:
        """Spans for which steps of a choice are captured, ascending."""
        selector, longest = self.parts.methods.of(choice), self.parts.max_tokens
        return span_buckets(selector.budget.total, longest) if selector.by_span else [longest]

    def _span(self, lane: Lane) -> int:
        return next(span for span in self._spans(lane.choice) if span >= lane.span)

    def _waits(self, selector: Selector) -> bool:
        """Whether decode steps of a method need the host, or rows that are streamed in from it."""
        streamed = not isinstance(selector, AheadSelector) and not all(self.parts.kv.resident)
        return streamed or selector.asks_host or isinstance(selector, ForeseeingSelector)

    def _run_parts(self, batch: Batch, graphs: DecodeGraphs, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of a batch, its captured lanes one after the other and then what is left; and states at packed positions."""
        captured = self._captured_lanes(batch, graphs)
        for lane in batch.lanes:  # ways that requests name are captured once they have recurred
            if lane not in captured and self._capturable(lane):
                graphs.meet(lane, self._span(lane))
        if not captured:
            return self._run_uncaptured(batch, positions)
        if len(captured) == len(batch.lanes) == 1 and not batch.prefills:
            return graphs.run(batch, self._span(captured[0]), self._fused), None
        done: list[tuple[Part, Tensor]] = []
        for number, lane in enumerate(captured, 1):
            part = lane_part(batch, lane)
            logits = graphs.run(part.batch, self._span(lane), self._fused)
            # The next graph may write its own numbers where this one's logits are.
            done.append((part, logits.clone() if number < len(captured) else logits))
        states, rest = None, rest_part(batch, captured)
        if rest is not None:
            logits, states = self._run_uncaptured(rest.batch, None if positions is None else positions - rest.shift)
            done.append((rest, logits))
        return joined(done, len(batch.last_tokens)), states

    def _run_uncaptured(self, batch: Batch, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A forward pass outside of graphs, and what enters the output layer at packed positions, where any are named."""
        if positions is None:
            return self._uncaptured(batch), None
        kept: list[Tensor] = []
        handle = decoder_of(self.loaded.model).register_forward_hook(lambda _, __, output: kept.append(output[0][0, positions]))
        try:
            return self._launched(batch), kept[0]  # hooks do not see what is captured
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
        """Run chunks of prompts and capture decode steps of all sizes and spans, so that no request waits for a compiler or a
        library. Nothing is stored, and nothing is done where steps are not captured, as on a CPU.

        Raises:
            DeviceMemoryError: the device is out of memory.
            DeviceError: it has failed.
        """
        if self._graphs is None:
            return
        with working_device(min(self.parts.step_tokens.alone, self.parts.max_tokens)):
            self._compile_kernels(self._graphs)
            warm_up_chunks(self._launched, self.parts)  # first: what several tokens run is compiled with many in mind
            if not self._waits(self.parts.selector):
                self._graphs.warm_up(self._spans(None), self._fused)
            if self._chunks is not None:
                self._chunks.record(self._chunks.sizes, self._fused_pass)
            # Captures give memory back that is free: the one that chunks need stays now.
            warm_up_chunks(self._launched, self.parts)

    @torch.inference_mode()
    def settle(self) -> None:
        """Have libraries prepare what they keep for each thread on the one that is to run the steps; `warm_up` does on its own.

        Raises:
            DeviceMemoryError: the device is out of memory.
            DeviceError: it has failed.
        """
        if self._graphs is not None:
            with working_device(min(self.parts.step_tokens.alone, self.parts.max_tokens)):
                warm_up_chunks(self._launched, self.parts)

    def _compile_kernels(self, graphs: DecodeGraphs) -> None:
        """Have the kernels of decode steps compiled beside each other, before others are chosen by how long they take: of the
        engine's own way, and of those that requests may name."""
        methods, shape, device = self.parts.methods, self.loaded.shape, self.parts.kv.device
        with Compilers(device) as compilers:
            compilers.walk(partial(choose_in_every_way, shape.vocab_size, shape.dtype, device))
            for choice in methods.choices():
                if not self._waits(methods.of(choice)):
                    for batch in graphs.paddings(self._spans(choice), choice):
                        if not compilers.walk(partial(self._forward, batch)):
                            break

    def _uncaptured(self, batch: Batch) -> Tensor:
        """A step that is not captured as a whole: short chunks are, in pieces, where no method watches them that may keep what it
        sees."""
        size = self._chunks.size_of(batch) if self._chunks is not None else None
        watched = any(self.parts.methods.watcher(segment.seat) is not None for segment in batch.prefills)
        if self._chunks is None or size is None or watched:
            return self._launched(batch)
        self._chunks.record([size], self._fused_pass)
        return self._forward(batch, self._chunks)

    def _launched(self, batch: Batch) -> Tensor:
        """A step that is launched kernel by kernel, compiled where prompts are computed and steps may be captured."""
        return self._fused(batch) if batch.prefills and self._graphs is not None else self._forward(batch)

    def _fused(self, batch: Batch) -> Tensor:
        fused: AbstractContextManager[None] = nullcontext()
        if self._compiled is not None:
            fused = self._compiled.use(len(batch.token_ids))
        with fused:
            return self._forward(batch)

    def _forward(self, batch: Batch, captured: ChunkGraphs | None = None) -> Tensor:
        """Logits of a batch; its attention runs here, and all else in `captured` pieces where there are any."""
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
            if captured is not None:
                logits, features = captured.run(batch, step)
            else:
                logits, features = self._pass(step, batch.token_ids, batch.positions, batch.last_tokens)
            step.end()
        finally:
            vars(step).clear()
        for selector in parts.methods.observers:
            selector.observe(batch, features)
        if batch.prefills:
            parts.prefix.observe(batch, features)
        if self._ranks is not None:  # all choose the same tokens
            logits = logits.contiguous()
            self._ranks.share_(logits)
        return logits

    def _pass(self, listener: object, token_ids: Tensor, positions: Tensor, last_tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the model: logits [E, V] of packed tokens int64 [E], and the features [T, F * H] of all, where a head sees any."""
        with listening(self.loaded.model, listener):
            output = self.loaded.model(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=last_tokens
            )
        logits: Tensor = output.logits[0]
        return logits, self.taps.take()[0] if self.taps is not None else None

    def _fused_pass(self, listener: object, *numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same with compiled layers."""
        with self._compiled.use(len(numbers[0])) if self._compiled is not None else nullcontext():
            return self._pass(listener, *numbers)

    def close(self) -> None:
        """Take the feature taps off the model and give back the memory of captured and compiled steps."""
        if self.taps is not None:
            self.taps.remove()
        if self._graphs is not None:
            self._graphs.close()
        if self._chunks is not None:
            self._chunks.close()
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
