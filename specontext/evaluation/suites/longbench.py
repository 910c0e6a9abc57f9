"""LongBench and LongBench-E (arXiv 2308.14508), asked and scored as https://github.com/THUDM/LongBench does it.

Data is the `data.zip` of the Hub's `zai-org/LongBench`, also under its former name `THUDM/LongBench` (the data set itself is a
loading script, which `datasets` does not run), a copy on the Hub with the same fields, or a directory with `NAME.jsonl` files
(`NAME_e.jsonl` for LongBench-E), also in a folder `data`, or Parquet files in folders NAME. A prompt that is too long for the
model loses its middle before the chat template is put around it. Upstream also forbids `samsum` to begin with a line break and
ends it at the next one; here it is written to its full length and its first line counts, which is the same answer unless the
model begins with a line break.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from specontext.evaluation.suites.data_files import (
    DataFile,
    DataFileError,
    HubArchive,
    HubData,
    HubName,
    Row,
    RowSource,
    data_files,
    locate,
)
from specontext.evaluation.suites.data_task import DataTask
from specontext.evaluation.suites.example import EvalTask, Example, TextTools
from specontext.evaluation.suites.longbench_metrics import METRICS, NEED_JIEBA, load_jieba
from specontext.evaluation.suites.longbench_tasks import EVEN_TASKS, TASKS, LongBenchTask
from specontext.tasks import LengthError

HUB = "zai-org/LongBench"
AUTHORS = (HUB, "THUDM/LongBench")  # one data set
ARCHIVE = "data.zip"
# LongBench-E reports means by the row's own length, in words or characters.
LENGTH_CLASSES = ((4000, "0-4k"), (8000, "4-8k"))
LAST_CLASS = "8k+"
_LEAST_PROMPT = 32  # tokens of a prompt that is cut; less than this asks nothing


@dataclass(frozen=True)
class LongBench(DataTask):
    """One task of LongBench or LongBench-E.

    Attributes:
        kind: how it asks and is scored.
        even: whether it is of LongBench-E.
    """

    kind: LongBenchTask
    even: bool

    def unfit(self, text: TextTools) -> str | None:
        """Why the task is left out unless it is asked for by name; None where it is not."""
        if self.kind.metric not in NEED_JIEBA:
            return None
        try:
            load_jieba()
        except DataFileError as error:
            return str(error)
        return None

    def check(self, row: Row) -> None:
        for field in ("input", "context", "language", "_id"):
            row.text(field, empty=field in ("input", "context"))
        named = row.text("dataset").removesuffix("_e")
        if named in TASKS and named != self.name.removesuffix("_e"):
            raise row.error(f"field 'dataset' says '{named}', but the data is read as '{self.name}'")
        answers = row.texts("answers")
        row.number("length")
        if self.kind.metric == "classification":
            row.texts("all_classes")
        if self.kind.metric in ("retrieval", "retrieval_zh"):
            try:
                METRICS[self.kind.metric]("", answers[0], ())
            except DataFileError as error:
                raise row.error(f"field 'answers': {error}") from error

    def ask(self, key: str, row: Row, length: int | None, room: int | None, text: TextTools) -> Example:
        if self.kind.metric in NEED_JIEBA:
            load_jieba()
        prompt = self.kind.prompt.format(context=row.text("context", empty=True), input=row.text("input", empty=True))
        classes = row.texts("all_classes") if row.has("all_classes") else ()
        return Example(
            self.suite,
            self.name,
            f"{key}-{row.text('_id')}",
            self._fitted(prompt, row, room, text),
            row.texts("answers"),
            self.kind.max_tokens,
            length,
            details={"classes": classes, "words": row.number("length")},
        )

    def score(self, example: Example, output: str) -> dict[str, float]:
        """The best agreement with an accepted answer; for LongBench-E also by the class of the row's length."""
        if self.kind.first_line:
            output = output.lstrip("\n").split("\n")[0]
        metric, classes = METRICS[self.kind.metric], example.details["classes"]
        score = max(metric(output, answer, classes) for answer in example.references)
        scores = {"score": score}
        if self.even:
            words = example.details["words"]
            scores[next((name for below, name in LENGTH_CLASSES if words < below), LAST_CLASS)] = score
        return scores

    def _fitted(self, prompt: str, row: Row, room: int | None, text: TextTools) -> str:
        """The prompt in its chat template, its middle cut out where the whole has no room beside the answer."""
        wrap = text.chat if self.kind.chat else str
        if room is None:
            return wrap(prompt)
        room -= self.kind.max_tokens
        keep = room - (text.count_tokens(wrap("x")) - text.count_tokens("x"))
        while keep >= _LEAST_PROMPT:
            fitted = wrap(text.truncate_middle(prompt, keep))
            excess = text.count_tokens(fitted) - room
            if excess <= 0:
                return fitted
            keep -= excess
        raise LengthError(f"{row.where} has no room for an answer of {self.kind.max_tokens} tokens: ask for a greater length")


def longbench(data: str | None = None, *, max_length: int | None = None) -> list[EvalTask]:
    """The tasks of LongBench that `data` has; of the Hub all 21.

    Args:
        data: a path or a name of the Hub; None is the Hub's own.
        max_length: longest context of the model in tokens, prompt and answer together.

    Raises:
        DataFileError: there is no such data, or none of LongBench.
    """
    return _tasks("longbench", TASKS, data, max_length)


def longbench_e(data: str | None = None, *, max_length: int | None = None) -> list[EvalTask]:
    """The tasks of LongBench-E that `data` has, of the Hub all 13; called NAME_e. Otherwise as `longbench`."""
    return _tasks("longbench-e", EVEN_TASKS, data, max_length)


def _tasks(suite: str, names: Iterable[str], data: str | None, max_length: int | None) -> list[EvalTask]:
    even = suite == "longbench-e"
    kinds = {f"{name}_e" if even else name: TASKS[name] for name in names}
    found = locate(data or HUB)
    if isinstance(found, HubName):
        sources = _hub(found, list(kinds))
    else:
        sources = {}
        for file in data_files(found):
            if (name := _name(file)) in kinds:
                if name in sources:
                    raise DataFileError(f"{found} has '{name}' twice: {sources[name][0]} and {file}; give one of them")
                sources[name] = (file,)
        if not sources:
            raise DataFileError(f"{found} has no file of {suite}: its files are called {', '.join(f'{n}.jsonl' for n in kinds)}")
    return [LongBench(suite, name, sources[name], max_length, kind, even) for name, kind in kinds.items() if name in sources]


def _hub(hub: HubName, names: list[str]) -> dict[str, tuple[RowSource, ...]]:
    if hub.subset is not None and hub.subset not in names:
        raise DataFileError(f"{hub.name} has no task '{hub.subset}' in this suite: choose one of {', '.join(names)}")
    chosen = [hub.subset] if hub.subset else names
    if hub.name in AUTHORS:
        if hub.split not in (None, "test"):
            raise DataFileError(f"{hub.name} has no split '{hub.split}', only 'test'")
        return {name: (HubArchive(HUB, ARCHIVE, name),) for name in chosen}
    return {name: (HubData(hub.name, name, hub.split or "test"),) for name in chosen}


def _name(file: DataFile) -> str:
    """The task of a file: its own name, or that of its folder for Parquet files called after their split or in a folder of it."""
    place: Path = file.place
    if place.suffix.lower() != ".parquet":
        return place.stem
    if place.parent.name == "test":
        return place.parent.parent.name
    return place.parent.name if place.stem.startswith("test") else place.stem
