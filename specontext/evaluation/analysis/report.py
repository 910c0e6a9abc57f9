"""One analysis from its settings to rows: everything that `specontext head analyze` measures."""

from __future__ import annotations

import math
import platform
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from specontext import __version__
from specontext.config import SpeContextConfig
from specontext.distill.data import Source, open_sources
from specontext.distill.target import Target
from specontext.engine.llm import LLM
from specontext.evaluation.analysis.drift import PROGRAM_LENGTH, PROMPTS, draw_prompts, drift_budget, measure_drift
from specontext.evaluation.analysis.entrants import feature_layers, load_heads, make_entrants
from specontext.evaluation.analysis.lengths import length_curve, standard_lengths
from specontext.evaluation.analysis.losses import loss_rows
from specontext.evaluation.analysis.overlap import overlap_rows
from specontext.evaluation.analysis.recall import ORACLE, Tick, judge
from specontext.evaluation.analysis.rows import Row, recall_targets
from specontext.evaluation.analysis.selection import Entrant, Kind
from specontext.evaluation.analysis.settings import LENGTH, SHORTEST, AnalysisError, Settings, shown
from specontext.evaluation.analysis.texts import draw_samples, fitting_length
from specontext.locations import shape_of
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.head_map import with_map

Begin = Callable[[str, int], Tick]  # a phase of so many parts begins; what it returns is called after each part


def quietly(phase: str, parts: int) -> Tick:
    """No progress is shown."""
    return lambda: None


@dataclass
class Analysis:
    """A measurement under way.

    Attributes:
        notes: what was measured, and what was left out and why, for the report.
    """

    settings: Settings
    begin: Begin = quietly
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Measure everything.

        Returns:
            the content of `analysis.json`; it names no absolute paths.

        Raises:
            SpeContextError: model, heads, texts or settings that do not fit; the message says what to do.
        """
        settings = self.settings
        began = self.begin("loading", 1)
        shape = shape_of(settings.target, trust_remote_code=settings.trust_remote_code)
        settings.check_lengths(shape.max_position)
        longest = min(shape.max_position, max(settings.length or LENGTH, PROGRAM_LENGTH) + settings.drift_tokens)
        full = SpeContextConfig(method="full")
        options: dict[str, Any] = {"max_num_seqs": 1, "max_model_len": longest, "enforce_eager": True}  # drift looks into steps
        options["trust_remote_code"] = settings.trust_remote_code
        llm = LLM(settings.target, None, full, settings.dtype, settings.device, **options)
        heads = load_heads(settings, shape, llm.engine.device)
        target = Target(llm.engine.loaded.model, feature_layers(heads))
        source = self._open(settings.texts, llm, held_out=True)
        length = settings.length or fitting_length(source, _halves(min(LENGTH, shape.max_position)))
        budgets = settings.budgets_for(length)
        eighth = min(budgets, key=lambda budget: abs(math.log(8 * budget / length)))
        began()
        entrants = self._entrants(llm, heads, target, length, eighth)
        self._at_one_length(target, entrants, source, length, budgets, eighth)
        self._over_lengths(target, entrants[0], source, length, shape.max_position)
        self._drift(llm, entrants[0], source, length)
        return self._report(entrants, length, budgets, eighth, llm.engine.device)

    def _entrants(self, llm: LLM, heads: dict[str, Any], target: Target, length: int, budget: int) -> list[Entrant]:
        count = self.settings.calibration_sequences
        tick = self.begin("calibrating head maps", 1)
        samples = []
        if count:
            training = self._open(self.settings.texts, llm, held_out=False)
            samples = draw_samples(training, length, count)
        entrants = make_entrants(heads, target, samples, length=length, budget=budget, settings=self.settings)
        self.notes["calibration"] = {"sequences": len(samples), "budget": budget if samples else None}
        tick()
        return entrants

    def _at_one_length(
        self, target: Target, entrants: Sequence[Entrant], source: Source, length: int, budgets: Sequence[int], eighth: int
    ) -> None:
        samples = draw_samples(source, length, self.settings.sequences)
        tick = self.begin(f"recall at {length:,} tokens", len(samples))
        judged = judge(target, entrants, samples, budgets, self.settings, tick=tick)
        self.notes["measured"] = {
            "asked_sequences": self.settings.sequences,
            "sequences": len(samples),
            "queries": judged.queries,
            "mean_tokens": sum(sample.tokens for sample in samples) / len(samples),
        }
        self.rows += judged.rows(length) + judged.hit_rows(length)
        kinds = [*entrants[0].standard().kinds("head"), Kind("shared_oracle", "head"), ORACLE]
        self.rows += judged.layer_rows(length, kinds, eighth)
        tick = self.begin("what the model loses", len(samples))
        self.rows += loss_rows(target, entrants, samples, budgets, length, self.settings, tick=tick)
        tick = self.begin("overlap of adjacent steps", len(samples))
        self.rows += overlap_rows(target, entrants, samples, budgets, length, self.settings, tick=tick)

    def _over_lengths(self, target: Target, entrant: Entrant, source: Source, length: int, longest: int) -> None:
        settings, lengths = self.settings, self.settings.lengths
        if lengths is None:
            lengths = standard_lengths(entrant.head.config, longest, settings.always)
        lengths = tuple(sorted(set(lengths)))
        tick = self.begin("recall against context length", len(lengths))
        curve = length_curve(target, entrant, source, lengths, settings, main_length=length, tick=tick)
        self.rows += curve.rows
        self.notes["lengths"] = {"measured": curve.measured, "left_out": {n: scrub(why) for n, why in curve.left_out.items()}}

    def _drift(self, llm: LLM, entrant: Entrant, source: Source, length: int) -> None:
        settings = self.settings
        if not settings.drift_tokens:
            self.notes["drift"] = {"left_out": "not asked for"}
            return
        if entrant.head.config.variant != "features":
            self.notes["drift"] = {"left_out": "the head reads no features"}
            return
        if any(spec.split(":")[0] == "tasks" for spec in settings.texts):  # programs have the longest outputs
            source, length = self._programs(llm), min(length, PROGRAM_LENGTH)
        prompts = draw_prompts(source, length, PROMPTS, settings.seed)
        new = min(settings.drift_tokens, llm.engine.parts.max_tokens - max(map(len, prompts)))
        if new < 2:
            self.notes["drift"] = {"left_out": f"no room for generated tokens after prompts of {max(map(len, prompts))} tokens"}
            return
        budget = drift_budget(prompts, new, settings.always)
        name = entrant.standard_map
        head = with_map(entrant.head, None if name == "identity" else entrant.maps[name])
        tick = self.begin(f"drift of features over {new:,} generated tokens", len(prompts))
        with tempfile.TemporaryDirectory() as folder:
            save_head(head, Path(folder) / "head")
            method = SpeContextConfig(budget=budget, sink=settings.sink, recent=settings.recent)
            llm.reconfigure(method, retrieval_head=Path(folder) / "head")
        drift = measure_drift(llm, prompts, new, tick=tick)
        self.rows += drift.rows(variant=entrant.label, map=name, budget=budget)
        self.notes["drift"] = {
            "budget": budget,
            "generated_tokens": new,
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "yarn_factor": llm.engine.parts.head.yarn_factor if llm.engine.parts.head is not None else None,
        }

    def _programs(self, llm: LLM) -> Source:
        return self._open(["tasks:program"], llm, held_out=True)

    def _open(self, specs: Sequence[str], llm: LLM, *, held_out: bool) -> Source:
        settings, size = self.settings, llm.shape.vocab_size
        return open_sources(specs, tokenizer=llm.tokenizer, seed=settings.seed, held_out=held_out, vocab_size=size)

    def _report(
        self, entrants: Sequence[Entrant], length: int, budgets: Sequence[int], eighth: int, device: torch.device
    ) -> dict[str, Any]:
        settings, config = self.settings, entrants[0].head.config
        return {
            "command": settings.command(),
            "date": date.today().isoformat(),
            "machine": describe_machine(device),
            "versions": {
                "specontext": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "head": {"name": shown(settings.head)} | config.to_dict() | {"source": scrub(config.source)},
            "heads": {
                one.label: {"trained_length": one.head.config.trained_length, "yarn_factor": one.yarn_factor, "maps": one.maps}
                for one in entrants
            },
            "target": shown(settings.target),
            "texts": [shown(text) for text in settings.texts],
            "length": length,
            "budgets": list(budgets),
            "budgets_left_out": sorted({*(settings.budgets or ())} - {*budgets}),
            "table_budget": eighth,
            "queries": settings.queries,
            "query_positions": "wanted positions of the last quarter of each sequence",
            "sink": settings.sink,
            "recent": settings.recent,
            "seed": settings.seed,
            "dtype": settings.dtype,
            **self.notes,
            "targets": recall_targets(self.rows, length, eighth, trained_length=config.trained_length),
            "rows": self.rows,
        }


def _halves(length: int) -> list[int]:
    """The length and its halves, down to the shortest that is measured."""
    lengths = [length]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    if length < SHORTEST:
        raise AnalysisError(f"the model's maximum of {length} tokens is too short to analyse a head on: {SHORTEST} are needed")
    return lengths


def describe_machine(device: torch.device) -> str:
    """The processor that measured, without the machine's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def scrub(text: str) -> str:
    """`text` with the last names of absolute paths in their place."""
    return re.sub(r"(?<![^\s,:;('\"])~?/[^\s,:;)'\"]*", lambda path: Path(path[0]).name, text)
