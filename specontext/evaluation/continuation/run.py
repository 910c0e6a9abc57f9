"""The suite `continuation`: what methods write after a half of a text, beside what full attention writes, greedily.

The text itself is no reference here: a continuation is compared with full attention's, and judged by what full attention thinks
of it (its mean log-probability, from a dense prefill of prompt and continuation).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specontext.core import RequestOutput
from specontext.engine.llm import LLM
from specontext.evaluation.competitors import Choice
from specontext.evaluation.continuation.measures import common_ngrams, distinct, first_difference, repetition, similarity
from specontext.evaluation.continuation.rows import SUITE
from specontext.evaluation.run import Advance, Begin, run_evaluation
from specontext.evaluation.samples import MEASURES, EvaluationError, Sample, SampleId, fingerprint
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.text_evaluation import REFERENCE, TextEvaluation
from specontext.evaluation.windows import Text, Window
from specontext.models.loading import LoadedModel
from specontext.retrieval.registry import FULL
from specontext.sampling_params import SamplingParams

WRITTEN = "token_ids"  # the statistic that has a sample's tokens


def run_continuation(settings: EvaluationSettings, begin: Begin, loaded: LoadedModel | None = None) -> dict[str, Any]:
    """Run what is not there yet, and return the content of `results.json`.

    Full attention is run in any case, since all others are compared with it.

    Args:
        loaded: the model, where it is loaded already.

    Raises:
        EvaluationError: as of `run_evaluation`; lengths or texts of which nothing can be run.
        DataError: a text that cannot be read.
    """
    return run_evaluation(settings, begin, _ContinuationEvaluation, loaded)


@dataclass(frozen=True)
class _Job:
    """A prompt: a window of a text, of half the length."""

    text: str
    length: int
    window: Window
    max_tokens: int

    @property
    def key(self) -> str:
        return f"{self.window.key}, {self.max_tokens} tokens"

    def name(self, choice: Choice) -> SampleId:
        return (SUITE, self.text, self.length, self.key, choice[0].label, choice[1])


class _ContinuationEvaluation(TextEvaluation):
    def run(self, begin: Begin) -> dict[str, Any]:
        self.report_full_first()
        jobs = self._draw(begin)
        self.refuse_nothing(jobs)
        lengths = dict.fromkeys(job.length for job in jobs)
        wanted = [
            (group, [job for job in jobs if job.length == length], [REFERENCE, *self.choices(group, SUITE, length)])
            for group in self.groups
            for length in lengths
        ]
        self.tally.count_all()
        advance = begin("writing", sum(len(some) * len(dict.fromkeys(choices)) for _, some, choices in wanted))
        for group, some, choices in wanted:
            llm = self.open(group)
            at_once = llm.engine.config.max_num_seqs
            for start in range(0, len(some), at_once):
                self._write_all(llm, some[start : start + at_once], dict.fromkeys(choices), advance)
        return self.tally.write()

    def _draw(self, begin: Begin) -> list[_Job]:
        """The prompts of all texts and lengths; notes say what is left out."""
        jobs = []
        for text, length, windows in self.windows(SUITE, begin, lambda length: (length // 2, length // 4)):
            half = length // 2
            # A token of room is needed to ask for the log-probabilities of all others.
            most = min(self.settings.new_tokens, length - half, self.max_length - 1 - half)
            some = [_Job(text, length, window, most) for window in windows]
            asked = {job.key: fingerprint(job.window.token_ids) for job in some}
            self.refuse_other_windows(SUITE, text, length, asked)
            jobs += some
        return jobs

    def open_texts(self) -> list[Text]:
        """Raises EvaluationError for a text that nobody wrote, beside what `Evaluation` refuses."""
        texts = super().open_texts()
        if generated := [text.name for text in texts if text.generated]:
            raise EvaluationError(f"{SUITE} goes on with documents and '{generated[0]}' is generated: give --text FILE")
        return texts

    def _write_all(self, llm: LLM, jobs: Sequence[_Job], choices: Collection[Choice], advance: Advance) -> None:
        """Let every method go on with some prompts, full attention first."""
        known, added = self.answered, False
        for choice in choices:
            todo = [job for job in jobs if job.name(choice) not in known]
            advance(len(jobs) - len(todo))
            if todo:
                self.samples.add(self._samples(llm, todo, choice))
                advance(len(todo))
                added = True
        for text, length in dict.fromkeys((job.text, job.length) for job in jobs) if added else ():
            self.tally.recount((SUITE, text, length))

    def _samples(self, llm: LLM, jobs: Sequence[_Job], choice: Choice) -> list[Sample]:
        competitor, budget = choice
        greedy = SamplingParams(temperature=0.0, seed=self.settings.seed, method=competitor.method, budget=budget)
        params = [replace(greedy, max_tokens=job.max_tokens) for job in jobs]
        prompts = [job.window.token_ids for job in jobs]
        if llm.engine.config.enable_prefix_caching:  # so that no method's time has the prompts in it
            llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1))
        began = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = (time.perf_counter() - began) / len(jobs)
        likely = log_probabilities(llm, outputs)
        samples = []
        for job, output, mean in zip(jobs, outputs, likely, strict=True):
            own = output.token_ids
            full = own if choice == REFERENCE else self.samples.samples[job.name(REFERENCE)].stats[WRITTEN]
            scores = compared(own, full) | {"log_probability": mean}
            stats = {name: output.stats[name] for name in MEASURES if name in output.stats} | {WRITTEN: own}
            asked, name = fingerprint(job.window.token_ids), job.name(choice)
            samples.append(
                Sample(*name, scores["score"], scores, output.text, output.finish_reason, len(own), stats, seconds, asked)
            )
        return samples


def compared(tokens: Sequence[int], full: Sequence[int]) -> dict[str, float]:
    """Scores of a continuation beside full attention's; `score` is their similarity."""
    return {
        "score": similarity(tokens, full),
        "parted_after": float(first_difference(tokens, full)),
        "common_ngrams": common_ngrams(tokens, full),
        "repetition": repetition(tokens),
        "distinct_1": distinct(tokens, 1),
        "distinct_2": distinct(tokens, 2),
        "tokens_written": float(len(tokens)),
    }


def log_probabilities(llm: LLM, outputs: Sequence[RequestOutput]) -> list[float]:
    """Mean log-probability (nats a token) of what was written, under full attention."""
    texts = [[*output.prompt_token_ids, *output.token_ids] for output in outputs]
    read = llm.generate(texts, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, method=FULL))
    means = []
    for output, again in zip(outputs, read, strict=True):
        assert again.prompt_logprobs is not None
        own = again.prompt_logprobs[len(output.prompt_token_ids) :]
        chosen = [found[token] for token, found in zip(output.token_ids, own, strict=True) if found is not None]
        means.append(sum(chosen) / len(chosen))
    return means
