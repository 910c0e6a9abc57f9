"""AIME 2024 and 2025, MATH-500 and GSM8K: a problem in words, a chain of thought, and a final answer that is compared by value.

Formats are those of the Hub: `HuggingFaceH4/aime_2024` and `math-ai/aime25` (problem, answer), `opencompass/AIME2025` (question,
answer), `HuggingFaceH4/MATH-500` (problem, solution, answer, subject, level, unique_id), `openai/gsm8k` (question, answer with
the result behind "####"), and rows with other names of the same fields (Problem, Answer). Data is such a name, a file, or a
directory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from specontext.evaluation.suites.data_files import DataFile, HubData, HubName, Row, RowSource, data_files, locate
from specontext.evaluation.suites.data_task import DataTask, answer_tokens
from specontext.evaluation.suites.example import EvalTask, Example, TextTools
from specontext.evaluation.suites.math_answers import equivalent, exact_number, final_answer, last_boxed

REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."
_PROBLEM, _ANSWER = ("problem", "question", "Problem", "Question"), ("answer", "Answer")


@dataclass(frozen=True)
class DataSet:
    """One of the data sets.

    Attributes:
        hub: names on the Hub with the subsets and the split that belong to the data set; the first is the default.
        max_tokens: of a chain of thought with its answer.
    """

    hub: dict[str, tuple[tuple[str | None, ...], str]]
    max_tokens: int


DATA_SETS = {
    "aime24": DataSet(
        {
            "HuggingFaceH4/aime_2024": ((None,), "train"),
            "Maxwell-Jia/AIME_2024": ((None,), "train"),
            "math-ai/aime24": ((None,), "test"),
        },
        32768,
    ),
    "aime25": DataSet(
        {
            "math-ai/aime25": ((None,), "test"),
            "opencompass/AIME2025": (("AIME2025-I", "AIME2025-II"), "test"),
            "yentinglin/aime_2025": (("default",), "train"),
        },
        32768,
    ),
    "math500": DataSet({"HuggingFaceH4/MATH-500": ((None,), "test")}, 16384),
    "gsm8k": DataSet({"openai/gsm8k": (("main",), "test")}, 4096),
}


@dataclass(frozen=True)
class MathTask(DataTask):
    """The problems of one data set; suite and task have its name."""

    def check(self, row: Row) -> None:
        row.text(*_PROBLEM)
        answer = self._reference(row)
        if self.name.startswith("aime") and exact_number(answer) not in range(1000):
            raise row.error(f"the answer '{answer}' is no whole number from 0 to 999, as those of AIME are")

    def ask(self, key: str, row: Row, length: int | None, room: int | None, text: TextTools) -> Example:
        prompt = text.chat(f"{row.text(*_PROBLEM).strip()}\n\n{REQUEST}")
        most = answer_tokens(row, prompt, DATA_SETS[self.name].max_tokens, length, room, text)
        details = {name: row.fields[name] for name in ("subject", "level") if row.has(name)}
        return Example(self.suite, self.name, key, prompt, (self._reference(row),), most, length, details=details)

    def score(self, example: Example, output: str) -> dict[str, float]:
        """`score` is 1 for the right answer; `answered` is 1 where the output gives one at all."""
        answer = final_answer(output, or_last_number=self.name == "gsm8k")
        right = answer is not None and any(equivalent(answer, reference) for reference in example.references)
        return {"score": float(right), "answered": float(answer is not None)}

    def _reference(self, row: Row) -> str:
        if self.name == "gsm8k":
            _, mark, result = row.text(*_ANSWER).rpartition("####")
            if not mark or not result.strip():
                raise row.error("field 'answer' has no result behind '####'")
            return result.strip().replace(",", "")
        if not row.has(*_ANSWER) and row.has("solution"):
            boxed = last_boxed(row.text("solution"))
            if not boxed:
                raise row.error("there is no answer: field 'solution' has no \\boxed{...}")
            return boxed
        named = next((name for name in _ANSWER if row.has(name)), "answer")
        value = row.fields.get(named)
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value):
            return str(int(value) if value == int(value) else value)  # tables make 33.0 of 33
        return row.text(*_ANSWER).strip()


def math_suite(name: str, data: str | None = None, *, max_length: int | None = None) -> list[EvalTask]:
    """The one task of the suite `name`: aime24 and aime25 (30 problems each), math500 or gsm8k (its test problems).

    Args:
        data: a path or a name of the Hub; None is the Hub's own, the first in `DATA_SETS`.
        max_length: longest context of the model in tokens, prompt and answer together.

    Raises:
        DataFileError: there is no such data.
    """
    found = locate(data or next(iter(DATA_SETS[name].hub)))
    sources = _hub(name, found) if isinstance(found, HubName) else _local(found)
    return [MathTask(name, name, sources, max_length)]


def _hub(name: str, hub: HubName) -> tuple[RowSource, ...]:
    subsets, split = DATA_SETS[name].hub.get(hub.name, ((None,), "test"))
    chosen = (hub.subset,) if hub.subset else subsets
    return tuple(HubData(hub.name, subset, hub.split or split) for subset in chosen)


def _local(path: Path) -> tuple[RowSource, ...]:
    """A file, or of a directory the test files where there are any, and those of GSM8K's main part where it has several."""
    files = data_files(path)
    for wanted in (_is_test, _is_main):
        files = [file for file in files if wanted(file)] or files
    return tuple(files)


def _is_test(file: DataFile) -> bool:
    return file.place.stem.startswith("test") or file.place.parent.name == "test"


def _is_main(file: DataFile) -> bool:
    return "main" in (file.place.parent.name, file.place.parent.parent.name)
