"""Questions about documents: what is asked, and the suite on a small text."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specontext.evaluation.run import run_evaluation
from specontext.evaluation.samples import EvaluationError
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.suites.documents import DocumentTask, documents
from specontext.evaluation.suites.documents_questions import BEFORE, passages, values
from specontext.evaluation.suites.generated import SuiteError
from specontext.evaluation.text_tools import text_tools
from specontext.evaluation.windows import Text
from specontext.tasks import LengthError
from tests.evaluation.test_fidelity import silently

WORDS = "the a sun moon river stone tree house road hill wind rain door lamp bird fish boat coat king ring".split()


def prose(words: int, seed: int = 0, every: int = 40) -> str:
    """Common words, and every now and then a number that stands there once."""
    rng = random.Random(seed)
    said = [rng.choice(WORDS) for _ in range(words)]
    for place in range(every, words, every):
        said[place] = str(1000 + seed + place)
    return " ".join(said)


def test_passages_go_on_with_something_rare() -> None:
    document = prose(400)
    found = passages(document)
    assert [question.answer.split()[0] for question in found] == [str(1000 + place) for place in range(40, 360, 40)]
    for question in found:
        assert document.count(question.begun) == 1 and len(question.begun.split()) == BEFORE
        assert f"{question.begun} {question.answer}" in document
    assert passages(document) == found


@pytest.mark.parametrize(
    ("word", "asked"),
    [("1,024", True), ("/etc/hosts", True), ("maxRetries", True), ("--verbose", True), ("Wolfgang", True), ("lanterns", False)],
)
def test_names_numbers_and_paths_are_rare_kinds_of_words(word: str, asked: bool) -> None:
    words = prose(200, every=999).split()
    words[100] = word
    assert [question.answer.split()[0] for question in passages(" ".join(words))] == [word] * asked


def test_what_stands_twice_before_another_answer_is_not_asked() -> None:
    words = prose(300, every=999).split()
    words[100], words[200] = "4711", "4712"
    words[200 - BEFORE : 200] = words[100 - BEFORE : 100]
    assert passages(" ".join(words)) == []
    words[100] = words[200] = "4711"  # the same answer, but it could be told from no other place
    assert passages(" ".join(words)) == []


def test_a_sentence_begins_with_a_capital_letter_whatever_it_says() -> None:
    words = prose(200, every=999).split()
    words[99], words[100] = "stone.", "Lanterns"
    assert passages(" ".join(words)) == []


def test_values_of_lines_and_tables() -> None:
    document = "\n".join(
        [
            *("# settings", "timeout = 30", "  max_size: 12 MiB,", "mode = {", "| port | 8080 | tcp |", "twice = 1", "twice = 2"),
            *("not a line of that kind", *[prose(30, seed) for seed in range(5)], "late = 3"),
        ]
    )
    assert [(question.begun, question.answer) for question in values(document)] == [
        ("# settings\ntimeout =", "30"),
        ("timeout = 30\n  max_size:", "12 MiB"),
        ("mode = {\n| port |", "8080"),
    ]
    assert all(f"{question.begun} {question.answer}" in document for question in values(document))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": prose(1200, 10_000 * n)}) + "\n" for n in range(2)))
    return path


@pytest.fixture(scope="module")
def task(text: Path, tokenizer: Any) -> DocumentTask:
    first = documents(texts=[Text(str(text), tokenizer, seed=0)])[0]
    assert isinstance(first, DocumentTask)
    return first


def test_problems_fit_their_length_and_are_the_same_again(task: DocumentTask, tokenizer: Any) -> None:
    tools = text_tools(tokenizer)
    examples = task.examples(length=1024, n=6, seed=1, text=tools)
    assert len({example.key for example in examples}) == 6 and examples == task.examples(length=1024, n=6, seed=1, text=tools)
    assert task.examples(length=1024, n=3, seed=1, text=tools) != task.examples(length=1024, n=3, seed=2, text=tools)
    for example in examples:
        assert tools.count_tokens(example.prompt) + example.max_tokens <= 1024
        assert example.references[0] in example.prompt and not example.prompt.endswith(example.references[0])
    with pytest.raises(LengthError, match="tokens at least"):
        task.examples(length=256, n=1, seed=0, text=tools)
    with pytest.raises(LengthError, match="no document of"):
        task.examples(length=9000, n=1, seed=0, text=tools)
    with pytest.raises(SuiteError, match="needs a length"):
        task.examples(length=None, n=1, seed=0, text=tools)


def test_scores(task: DocumentTask, tokenizer: Any) -> None:
    example = replace(task.examples(length=1024, n=1, seed=0, text=text_tools(tokenizer))[0], references=("4711 Old stone",))
    assert task.score(example, ' 4711, "old" stone. And more') == {"score": 1.0, "f1": 1.0}
    assert task.score(example, "4711 new stone") == {"score": 0.0, "f1": pytest.approx(2 / 3)}
    assert task.score(example, "")["score"] == 0


def test_the_suite(text: Path, tmp_path: Path) -> None:
    settings = EvaluationSettings(
        "nano",
        ("documents",),
        tmp_path / "out",
        methods=("full", "streaming"),
        budgets=(64,),
        lengths=(800,),
        limit=4,
        texts=(str(text),),
        engine={"device": "cpu", "max_num_seqs": 4, "max_model_len": 1024},
    )
    results = run_evaluation(settings, silently)
    full, streaming = results["rows"]
    assert (full["task"], full["n"]) == ("rows.jsonl, passages", 4) and 0 <= full["scores"]["f1"] <= 1
    assert full["beside_full"]["same"] == {"mean": 1, "low": 1, "high": 1} and streaming["beside_full"]["same"]["mean"] <= 1
    (pair,) = results["pairs"]
    assert pair["differences"]["f1"]["mean"] == pytest.approx(streaming["scores"]["f1"] - full["scores"]["f1"])
    assert any("rows.jsonl, values" in note.get("task", "") and "no question" in note["why"] for note in results["meta"]["notes"])
    assert run_evaluation(settings, silently)["rows"] == results["rows"]
    with pytest.raises(EvaluationError, match="documents needs texts"):
        replace(settings, texts=())
    with pytest.raises(SuiteError, match="'tasks' is generated"):
        run_evaluation(replace(settings, texts=("tasks",), out=tmp_path / "other"), silently)
    with pytest.raises(SuiteError, match="takes no data"):
        run_evaluation(replace(settings, data="x", out=tmp_path / "other"), silently)
