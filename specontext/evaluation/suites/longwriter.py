"""LongBench-Write and LongWrite-Ruler (arXiv 2408.07055): does a model write as long as it is asked to, and well?

Data is a file of https://github.com/THUDM/LongWriter (`evaluation/longbench_write.jsonl`, `longbench_write_en.jsonl`,
`longwrite_ruler.jsonl`: prompt, type, length in words) or a directory of these. Upstream samples at temperature 0.5; here the
runner decides, which is greedy. Quality is judged by another model where one is given (see `longwriter_judge`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from specontext.evaluation.suites.data_files import DataFileError, HubName, Row, data_files, locate
from specontext.evaluation.suites.data_task import DataTask, answer_tokens
from specontext.evaluation.suites.example import EvalTask, Example, TextTools
from specontext.evaluation.suites.longwriter_judge import Judge, quality

SUITE = "longwriter"
MAX_TOKENS = 32768
SOURCE = "https://github.com/THUDM/LongWriter/tree/main/evaluation"
_WORD = re.compile(r"[\u4e00-\u9fff]|\b[a-zA-Z]+\b")


@dataclass(frozen=True)
class LongWriterTask(DataTask):
    """The writing requests of one file.

    Attributes:
        judge: who judges quality; None for nobody.
    """

    judge: Judge | None

    def check(self, row: Row) -> None:
        row.text("prompt")
        row.text("type")
        if row.number("length") < 1:
            raise row.error(f"field 'length' must be at least 1, not {row.number('length')}")

    def ask(self, key: str, row: Row, length: int | None, room: int | None, text: TextTools) -> Example:
        request = row.text("prompt")
        prompt = text.chat(request)
        most = answer_tokens(row, prompt, MAX_TOKENS, length, room, text)
        details = {"words": row.number("length"), "type": row.text("type"), "request": request}
        return Example(self.suite, self.name, key, prompt, (), most, length, details=details)

    def score(self, example: Example, output: str) -> dict[str, float]:
        """`score` is the length score S_l, `words` the length.

        With a judge also `judged`, 1 where it gave its marks, and then the marks in 0..1 and their mean `quality`, the score S_q.
        """
        words = count_words(output)
        scores = {"score": length_score(example.details["words"], words), "words": float(words)}
        if self.judge is not None:
            marks = self.judge.marks(example.details["request"], output)
            scores |= {"judged": float(marks is not None)} | ({} if marks is None else quality(marks))
        return scores


def count_words(text: str) -> int:
    """Chinese characters and words of Latin letters."""
    return len(_WORD.findall(text))


def length_score(required: int, written: int) -> float:
    """S_l of the paper, in 0..1: 1 for the required length, 0 for four times or a third of it, linear in the ratio between."""
    if written == 0:
        return 0.0
    if written > required:
        return max(0.0, 1 - (written / required - 1) / 3)
    return max(0.0, 1 - (required / written - 1) / 2)


def longwriter(data: str | None = None, *, max_length: int | None = None, judge: Judge | None = None) -> list[EvalTask]:
    """A task for each file of writing requests, called after it.

    Args:
        data: a JSONL file or a directory of them.
        max_length: longest context of the model in tokens, prompt and answer together.
        judge: who judges quality.

    Raises:
        DataFileError: no data was given, or there is none.
    """
    if data is None or isinstance(found := locate(data), HubName):
        raise DataFileError(
            f"the suite '{SUITE}' needs --data: a file or directory of {SOURCE}{'' if data is None else f', not {data!r}'}"
        )
    tasks = [LongWriterTask(SUITE, file.place.stem, (file,), max_length, judge) for file in data_files(found)]
    if len({task.name for task in tasks}) < len(tasks):
        raise DataFileError(f"{found} has two files of one name: give one of them")
    return list[EvalTask](tasks)
