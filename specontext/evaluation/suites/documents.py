"""The suite `documents`: questions about the user's own texts, whose answers stand in them word for word.

Two tasks for each text, `passages` and `values` (see `documents_questions`). A prompt is a part of one document and a question,
and ends with the beginning of the answer, so that small models can go on from it. `score` is 1 where the output begins with the
answer, `f1` that of its words. Beside full attention: see `document_columns`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from specontext.evaluation.bootstrap import mean_interval
from specontext.evaluation.samples import Sample
from specontext.evaluation.suites.documents_questions import AFTER, KINDS, Question
from specontext.evaluation.suites.example import EvalTask, Example, TextTools
from specontext.evaluation.suites.generated import SuiteError
from specontext.evaluation.suites.longbench_metrics import qa_f1
from specontext.evaluation.windows import ShortTextError, Text
from specontext.tasks import LengthError

SUITE = "documents"
PAIRED = ("f1",)
ANSWER_TOKENS = 32
QUESTION_TOKENS = 160
SPARE_TOKENS = 16  # by which a part of a text may grow when it is encoded again
INSTRUCTION = "Read the document and answer the question about it."
_EDGES = re.compile(r"^\W+|\W+$")


@dataclass(frozen=True)
class DocumentTask:
    """Questions of one kind about one text."""

    suite: str
    name: str
    source: Text
    kind: str

    default_lengths: ClassVar[tuple[int, ...]] = (4096,)

    def examples(self, *, length: int | None, n: int, seed: int, text: TextTools) -> list[Example]:
        """The first `n` problems of `seed`: one about each part of the text, then further ones; fewer where it has fewer.

        Raises:
            SuiteError: no length was given.
            LengthError: no document is as long, or none has such a question.
        """
        if length is None:
            raise SuiteError(f"{self.suite}/{self.name} needs a length in tokens: give one with --lengths")
        around = text.count_tokens(_prompt("", Question("", "", ""), text)) + QUESTION_TOKENS + ANSWER_TOKENS + SPARE_TOKENS
        room = length - around
        if room < AFTER * QUESTION_TOKENS:
            raise LengthError(f"it needs {around + AFTER * QUESTION_TOKENS} tokens at least: ask for a greater length")
        try:
            windows = self.source.windows(room, n, max(1, room // 2))
        except ShortTextError as error:
            raise LengthError(str(error)) from error
        asked = []
        for window in windows:
            document = _whole_words(self.source.tokenizer.decode(window.token_ids, skip_special_tokens=True))
            questions = KINDS[self.kind](document)
            random.Random(f"{self.name}/{length}/{seed}/{window.key}").shuffle(questions)
            asked.append((window.key, document, questions))
        rounds = range(max(len(questions) for _, _, questions in asked))
        examples = [
            self._example(f"{key}, {number}", length, document, questions[number], text)
            for number in rounds
            for key, document, questions in asked
            if number < len(questions)
        ]
        if not examples:
            raise LengthError(f"no question of this kind is found in {self.source.spec}: leave this task out, or give other text")
        return examples[:n]

    def _example(self, key: str, length: int, document: str, question: Question, text: TextTools) -> Example:
        prompt = _prompt(document, question, text)
        return Example(self.suite, self.name, key, prompt, (question.answer,), ANSWER_TOKENS, length)

    def score(self, example: Example, output: str) -> dict[str, float]:
        answer = example.references[0]
        said = " ".join(output.split()[: len(answer.split())])
        return {"score": float(words_of(said) == words_of(answer)), "f1": qa_f1(said, answer)}


def documents(data: str | None = None, *, texts: Sequence[Text] = ()) -> list[EvalTask]:
    """Both tasks of every text.

    Raises:
        SuiteError: `data` was given, or a text that is generated.
    """
    if data is not None:
        raise SuiteError(f"the suite '{SUITE}' is about texts and takes no data: give --text FILE")
    if generated := [text.name for text in texts if text.generated]:
        raise SuiteError(f"'{generated[0]}' is generated and the suite '{SUITE}' is about documents: give --text FILE")
    return [DocumentTask(SUITE, f"{text.name}, {kind}", text, kind) for text in texts for kind in KINDS]


def words_of(text: str) -> list[str]:
    """Words in lower case, without what stands around them."""
    return [word for part in text.lower().split() if (word := _EDGES.sub("", part))]


def document_columns(samples: Sequence[Sample], full: Sequence[Sample], *, seed: int) -> dict[str, Any]:
    """Columns of a row beside full attention on the same problems, with 95 % intervals: `beside_full`.

    `same` is the share of problems with the same answer, right or wrong, and `f1` that of its words; both look at as many words
    as are asked for.

    Args:
        full: samples of full attention, none where it was not run.
    """
    theirs: Mapping[str, str] = {sample.key: _answer(sample) for sample in full}
    both = [(_answer(sample), theirs[sample.key]) for sample in samples if sample.key in theirs]
    if not both:
        return {}
    found = {"same": [float(words_of(one) == words_of(other)) for one, other in both], "f1": [qa_f1(*pair) for pair in both]}
    columns = {}
    for name, numbers in found.items():
        low, high = mean_interval(numbers, seed=seed)
        columns[name] = {"mean": sum(numbers) / len(numbers), "low": low, "high": high}
    return {"beside_full": columns}


def _answer(sample: Sample) -> str:
    return " ".join(sample.output.split()[:AFTER])


def _prompt(document: str, question: Question, text: TextTools) -> str:
    message = f"{INSTRUCTION}\n\n{document}\n\n{INSTRUCTION}\n\nQuestion: {question.asked}"
    return f"{text.chat(message)}\n\nAnswer: {question.begun}" if text.chat("") == "" else f"{text.chat(message)}{question.begun}"


def _whole_words(text: str) -> str:
    """Without what a cut has left of a word at either end."""
    first, last = re.search(r"\s", text), re.search(r"\s\S*$", text)
    return text[first.start() if first else 0 : last.start() if last else None].strip()
