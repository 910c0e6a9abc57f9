"""What was made of each problem: one line each in `samples.jsonl`, appended as it comes, so that a stopped run can go on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from specontext.errors import SpeContextError, shown

FILE = "samples.jsonl"
# Statistics of the engine that samples keep.
MEASURES = (
    "prompt_tokens",
    "cached_tokens",
    "decode_steps",
    "tokens_read_per_step",
    "selection_bytes_per_step",
    "selection_s_per_step",
    "bytes_loaded_per_step",
    "bytes_full_per_step",
    "overlap",
    "hit_rate",
    "attention_recall",
    "ttft_s",
    "tpot_s",
)

SampleId = tuple[str, str, int | None, str, str, int | None]


class EvaluationError(SpeContextError, ValueError):
    """An evaluation that cannot be run as asked; the message says what to do."""


@dataclass(frozen=True)
class Sample:
    """One answer to one problem.

    Attributes:
        key: names the problem among those of its task and length.
        method: as it was asked for, with the retrieval head where one was named.
        budget: None for a method that reads everything.
        scores: `score` and whatever else the task's scorer reports.
        stats: of the engine, numbers, those of `MEASURES` among them, and lists of numbers.
        seconds: wall time of the batch that the problem was answered in, over the problems in it; its prompts were known before.
        asked: fingerprint of what the model was given; empty in samples of versions that did not record it.
    """

    suite: str
    task: str
    length: int | None
    key: str
    method: str
    budget: int | None
    score: float
    scores: dict[str, float]
    output: str
    finish_reason: str | None
    output_tokens: int
    stats: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    asked: str = ""

    @property
    def id(self) -> SampleId:
        """What a resumed run knows it by."""
        return (self.suite, self.task, self.length, self.key, self.method, self.budget)


def fingerprint(token_ids: Sequence[int]) -> str:
    """Tells prompts apart that have the same name."""
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()[:12]


class SampleFile:
    """The samples of a directory: those that are there, and those that are added.

    Raises:
        EvaluationError: the file cannot be read or holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.samples: dict[SampleId, Sample] = {}
        for sample in self._read():
            self.samples[sample.id] = sample

    def add(self, samples: Iterable[Sample]) -> None:
        """Append samples, on the disk before this returns."""
        new = list(samples)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in new)
            file.flush()
            os.fsync(file.fileno())
        for sample in new:
            self.samples[sample.id] = sample

    def check(self, suite: str, task: str, length: int | None, asked: Mapping[str, str]) -> None:
        """Raises EvaluationError where a problem that is answered already was another one than the one of its name now.

        Args:
            asked: fingerprints of problems by their keys.
        """
        for sample in self.samples.values():
            if (sample.suite, sample.task, sample.length) != (suite, task, length) or not sample.asked:
                continue
            if asked.get(sample.key, sample.asked) != sample.asked:
                raise EvaluationError(
                    f"{self.path.parent} has answers to other problems of {suite}/{task} (problem {sample.key} is not the same): "
                    "the data, or the version that drew the problems, is another one; choose another directory"
                )

    def _read(self) -> list[Sample]:
        if not self.path.exists():
            return []
        try:
            text = self.path.read_bytes()
            whole, newline, torn = text.rpartition(b"\n")
            if torn:  # the run was stopped while it wrote this line
                with self.path.open("r+b") as file:
                    file.truncate(len(whole) + len(newline))
            return [self._sample(line, number) for number, line in enumerate(whole.decode().split("\n"), 1) if line]
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{self.path} cannot be read: {error}") from error

    def _sample(self, line: str, number: int) -> Sample:
        try:
            raw = json.loads(line)
            values = {f.name: raw[f.name] for f in fields(Sample) if f.name != "asked"} | {"asked": raw.get("asked") or ""}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EvaluationError(f"line {number} of {self.path} is no sample: mend it or choose another directory") from error
        if odd := next((name for name, value in values.items() if not _fits(name, value)), None):
            raise EvaluationError(
                f"line {number} of {self.path} is no sample, its {odd} is {shown(values[odd])}: mend it or choose "
                "another directory"
            )
        return Sample(**values)


def _fits(name: str, value: Any) -> bool:
    """Whether a value read from a file is what `Sample` has by that name."""
    if name in ("length", "budget", "output_tokens"):
        return (value is None and name != "output_tokens") or (_is_number(value) and isinstance(value, int) and value >= 0)
    if name in ("score", "seconds"):
        return _is_number(value) and math.isfinite(value)
    if name == "scores":
        return isinstance(value, dict) and all(_is_number(each) for each in value.values())
    if name == "stats":
        return isinstance(value, dict) and all(
            one is None or _is_number(one)
            for measure, found in value.items()
            for one in (found if measure not in MEASURES and isinstance(found, list) else [found])
        )
    return isinstance(value, str) or (name == "finish_reason" and value is None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
