"""The suite `fidelity` of an evaluation: every window of every text, full attention and all methods side by side.

A row's score is the share of positions at which a method finds the same most likely token as full attention; see
`specontext.evaluation.fidelity.rows` for what stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specontext.engine.llm import LLM
from specontext.evaluation.competitors import Choice
from specontext.evaluation.fidelity.compare import Comparison, Fidelity, most_windows
from specontext.evaluation.fidelity.rows import SUITE
from specontext.evaluation.run import Advance, Begin, run_evaluation
from specontext.evaluation.samples import MEASURES, Sample, SampleId, fingerprint
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.text_evaluation import REFERENCE, TextEvaluation
from specontext.evaluation.windows import Window
from specontext.models.loading import LoadedModel

NOT_MEASURED = ("ttft_s", "tpot_s")  # nobody waits for an answer


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
    windows: Sequence[Window]


@dataclass(frozen=True)
class _Job:
    """A window, and what is not known of it yet."""

    cell: _Cell
    window: Window
    todo: tuple[Choice, ...]


class _FidelityEvaluation(TextEvaluation):
    def run(self, begin: Begin) -> dict[str, Any]:
        self.report_full_first()
        cells = self._draw(begin)
        self.refuse_nothing(cells)
        lengths = dict.fromkeys(cell.length for cell in cells)
        wanted = [(group, length, self.choices(group, SUITE, length)) for group in self.groups for length in lengths]
        self.tally.count_all()
        at = {length: [cell for cell in cells if cell.length == length] for length in lengths}
        parts = {length: sum(len(cell.windows) for cell in some) for length, some in at.items()}
        advance = begin(
            "comparing", sum(parts[length] * (len(choices) + (REFERENCE not in choices)) for _, length, choices in wanted)
        )
        for group, length, choices in wanted:
            self._compare(self.open(group), at[length], dict.fromkeys((REFERENCE, *choices)), advance)
        return self.tally.write()

    def _draw(self, begin: Begin) -> list[_Cell]:
        """The windows of all texts and lengths; notes say what is left out."""

        def cut(length: int) -> tuple[int, int]:
            return length, min(self.settings.compared, length // 2)

        cells = []
        for text, length, windows in self.windows(SUITE, begin, cut):
            cell = _Cell(text, length, cut(length)[1], windows)
            asked = {_key(cell, window): fingerprint(window.token_ids) for window in windows}
            self.refuse_other_windows(SUITE, text, length, asked)
            cells.append(cell)
        return cells

    def _compare(self, llm: LLM, cells: Sequence[_Cell], choices: Collection[Choice], advance: Advance) -> None:
        """All windows of one length: those of all texts go together, as many at once as the engine takes."""
        known = self.answered
        jobs = [
            _Job(cell, window, tuple(choice for choice in choices if _name(cell, window, choice) not in known))
            for cell in cells
            for window in cell.windows
        ]
        advance(sum(len(choices) - len(job.todo) for job in jobs))
        for todo in dict.fromkeys(job.todo for job in jobs if job.todo):
            alike = [job for job in jobs if job.todo == todo]
            at_once = most_windows(llm, max(job.cell.compared for job in alike))
            for start in range(0, len(alike), at_once):
                some = alike[start : start + at_once]
                for samples in _measure(llm, some, self.settings.seed):
                    self.samples.add(samples)
                    advance(len(samples))
                for text, length in dict.fromkeys((job.cell.text, job.cell.length) for job in some):
                    self.tally.recount((SUITE, text, length))


def _key(cell: _Cell, window: Window) -> str:
    return f"{window.key}, last {cell.compared}"


def _name(cell: _Cell, window: Window, choice: Choice) -> SampleId:
    return (SUITE, cell.text, cell.length, _key(cell, window), choice[0].label, choice[1])


def _measure(llm: LLM, jobs: Sequence[_Job], seed: int) -> Iterator[list[Sample]]:
    """Samples of jobs that lack the same choices, of as many choices at a time as the engine has seats for."""
    todo, began = jobs[0].todo, time.perf_counter()
    comparison = Comparison(llm, [job.window for job in jobs], seed=seed)
    if REFERENCE in todo:
        seconds = (time.perf_counter() - began) / len(jobs)
        yield [_sample(job, REFERENCE, own, seconds) for job, own in zip(jobs, comparison.full, strict=True)]
    others = [choice for choice in todo if choice != REFERENCE]
    together = max(1, llm.engine.config.max_num_seqs // len(jobs))
    for start in range(0, len(others), together):
        some, began = others[start : start + together], time.perf_counter()
        measured = comparison.methods([(competitor.method, budget) for competitor, budget in some])
        seconds = (time.perf_counter() - began) / (len(jobs) * len(some))
        yield [
            _sample(job, choice, fidelity, seconds)
            for job, found in zip(jobs, measured, strict=True)
            for choice, fidelity in zip(some, found, strict=True)
        ]


def _sample(job: _Job, choice: Choice, fidelity: Fidelity, seconds: float) -> Sample:
    scores = {
        "score": fidelity.agreement,
        "kl_divergence": fidelity.kl_divergence,
        "cross_entropy": fidelity.cross_entropy,
        "full_cross_entropy": fidelity.full_cross_entropy,
    }
    kept = [name for name in (*MEASURES, "attention_recall_by_layer") if name in fidelity.stats and name not in NOT_MEASURED]
    stats = {name: fidelity.stats[name] for name in kept}
    name, asked = _name(job.cell, job.window, choice), fingerprint(job.window.token_ids)
    return Sample(*name, fidelity.agreement, scores, "", "length", job.cell.compared, stats, seconds, asked)
