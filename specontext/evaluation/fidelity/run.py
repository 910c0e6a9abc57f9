"""The suite `fidelity` of an evaluation: every window of every text, full attention and all methods side by side.

A row's score is the share of positions at which a method finds the same most likely token as full attention; see
`specontext.evaluation.fidelity.rows` for what stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from specontext.core import SamplingParams
from specontext.engine.llm import LLM
from specontext.evaluation.competitors import READS_ALL, Competitor
from specontext.evaluation.fidelity.compare import Fidelity, compare_window
from specontext.evaluation.fidelity.rows import SUITE
from specontext.evaluation.fidelity.windows import ShortTextError, Text, Window
from specontext.evaluation.rows import MEASURES
from specontext.evaluation.run import Advance, Begin, Choice, Evaluation, run_evaluation
from specontext.evaluation.samples import EvaluationError, Sample, fingerprint
from specontext.evaluation.settings import EvaluationSettings
from specontext.models.loading import LoadedModel

LENGTH = 4096  # of windows, where none was asked for
SHORTEST = 16
NOT_MEASURED = ("ttft_s", "tpot_s")  # nobody waits for an answer
FULL: Choice = (Competitor(READS_ALL, READS_ALL), None)


def run_fidelity(settings: EvaluationSettings, begin: Begin, loaded: LoadedModel | None = None) -> dict[str, Any]:
    """Run what is not there yet, and return the content of `results.json`.

    Full attention is run in any case, since all others are compared with it.

    Args:
        loaded: the model, where it is loaded already.

    Raises:
        EvaluationError: as of `run_evaluation`; lengths or texts of which nothing can be run.
        DataError: a text that cannot be read.
    """
    return run_evaluation(settings, begin, _FidelityEvaluation, loaded)


@dataclass(frozen=True)
class _Cell:
    """The windows of a text at a length."""

    text: str
    length: int
    compared: int
    windows: list[Window]


class _FidelityEvaluation(Evaluation):
    engine_options: ClassVar[dict[str, Any]] = {"measure_recall": True}

    def run(self, begin: Begin) -> dict[str, Any]:
        self.methods = [READS_ALL, *(method for method in self.methods if method != READS_ALL)]
        cells = self._draw(begin)
        if not cells:
            raise EvaluationError("nothing can be run: " + "; ".join(dict.fromkeys(note["why"] for note in self.notes)))
        wanted = [(group, cell, self._choices(group, SUITE, cell.length)) for group in self.groups for cell in cells]
        self._count_all()
        advance = begin("comparing", sum(len(cell.windows) for _, cell, _ in wanted))
        for group, cell, choices in wanted:
            self._compare(self.engines.open(group), cell, [choice for choice in choices if choice != FULL], advance)
        return self._write()

    def _draw(self, begin: Begin) -> list[_Cell]:
        """The windows of all texts and lengths, and notes of what is left out."""
        settings, cells = self.settings, []
        lengths = settings.lengths or (min(LENGTH, self.max_length),)
        if min(lengths) < SHORTEST:
            raise EvaluationError(f"a length of {SUITE} must be at least {SHORTEST} tokens, got {min(lengths)}")
        options = {"seed": settings.seed, "vocab_size": self.vocab_size}
        texts = [Text(spec, self.tokenizer, **options) for spec in dict.fromkeys(settings.texts)]
        if len({text.name for text in texts}) < len(texts):
            raise EvaluationError("two texts have the same name: give them as relative paths, or rename one")
        advance = begin("reading texts", len(texts) * len(lengths))
        for text in texts:
            for length in lengths:
                compared = min(settings.compared, length // 2)
                place = {"suite": SUITE, "task": text.name, "length": length}
                advance(1)
                if length > self.max_length:
                    self.notes.append(place | {"why": f"skipped: the model's contexts end at {self.max_length} tokens"})
                    continue
                try:
                    windows = text.windows(length, settings.limit, compared)
                except ShortTextError as error:
                    self.notes.append(place | {"why": f"skipped: {error}"})
                    continue
                if len(windows) < settings.limit:
                    why = f"there are {len(windows)} windows, fewer than the limit of {settings.limit}"
                    self.notes.append(place | {"why": why})
                cells.append(_Cell(text.name, length, compared, windows))
                self._check_known(cells[-1])
        return cells

    def _check_known(self, cell: _Cell) -> None:
        """Raises EvaluationError when samples of other windows would be averaged with those of this run."""
        samples = self.samples.samples.values()
        known = {
            sample.key for sample in samples if (sample.suite, sample.task, sample.length) == (SUITE, cell.text, cell.length)
        }
        asked = {_key(cell, window): fingerprint(window.token_ids) for window in cell.windows}
        if not (known <= asked.keys() or asked.keys() <= known):
            raise EvaluationError(
                f"{self.settings.out} has other windows of {cell.text} at {cell.length} tokens: give the same --limit and "
                "--compare, or choose another directory"
            )
        self.samples.check(SUITE, cell.text, cell.length, asked)

    def _compare(self, llm: LLM, cell: _Cell, choices: Sequence[Choice], advance: Advance) -> None:
        known, added = self.samples.samples, False
        for window in cell.windows:
            todo = [choice for choice in (FULL, *choices) if _name(cell, window, choice) not in known]
            if todo:
                self.samples.add(_measure(llm, cell, window, todo, self.settings.seed))
                added = True
            advance(1)
        if added:
            self._recount((SUITE, cell.text, cell.length))


def _key(cell: _Cell, window: Window) -> str:
    return f"{window.key}, last {cell.compared}"


def _name(cell: _Cell, window: Window, choice: Choice) -> tuple[str, str, int | None, str, str, int | None]:
    return (SUITE, cell.text, cell.length, _key(cell, window), choice[0].label, choice[1])


def _measure(llm: LLM, cell: _Cell, window: Window, todo: Sequence[Choice], seed: int) -> list[Sample]:
    """Compare one window, as many methods at once as the engine has seats for beside full attention."""
    others = [choice for choice in todo if choice != FULL]
    at_once = max(llm.engine.config.max_num_seqs - 1, 1)
    if others:  # its prompt is computed once and found by all
        llm.generate([window.prompt], SamplingParams(temperature=0.0, max_tokens=1))
    samples: list[Sample] = []
    for start in range(0, max(len(others), 1), at_once):
        some = others[start : start + at_once]
        began = time.perf_counter()
        measured = compare_window(llm, window, [(one.method, budget) for one, budget in some], seed=seed)
        seconds = (time.perf_counter() - began) / len(measured)
        pairs = zip((FULL, *some), measured, strict=True)
        new = [_sample(cell, window, choice, fidelity, seconds) for choice, fidelity in pairs]
        samples += new if FULL in todo and not start else new[1:]
    return samples


def _sample(cell: _Cell, window: Window, choice: Choice, fidelity: Fidelity, seconds: float) -> Sample:
    scores = {
        "score": fidelity.agreement,
        "kl_divergence": fidelity.kl_divergence,
        "cross_entropy": fidelity.cross_entropy,
        "full_cross_entropy": fidelity.full_cross_entropy,
    }
    kept = [name for name in (*MEASURES, "attention_recall_by_layer") if name in fidelity.stats and name not in NOT_MEASURED]
    stats = {name: fidelity.stats[name] for name in kept}
    name = _name(cell, window, choice)
    return Sample(*name, fidelity.agreement, scores, "", "length", cell.compared, stats, seconds, fingerprint(window.token_ids))
