"""What was made of each problem: one line each in `samples.jsonl`, appended as it comes, so that a stopped run can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from specontext.errors import SpeContextError

FILE = "samples.jsonl"

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
        stats: of the engine, see `MEASURES` in `specontext.evaluation.rows`.
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
            return Sample(**{f.name: raw[f.name] for f in fields(Sample) if f.name != "asked"}, asked=raw.get("asked", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"line {number} of {self.path} is no sample: mend it or choose another directory") from error
