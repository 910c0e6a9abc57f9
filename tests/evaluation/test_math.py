"""Mathematics suites: rows as the Hub has them, and answers found in outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from specontext.evaluation.suites import SUITES, Example, TextTools
from specontext.evaluation.suites.data_files import DataFileError
from specontext.evaluation.suites.math_answers import final_answer
from specontext.evaluation.text_tools import text_tools
from specontext.tasks import LengthError

ROWS: dict[str, dict[str, Any]] = {
    "aime24": {
        "id": 60,
        "problem": "Find the number.",
        "solution": r"\boxed{204}",
        "answer": "204",
        "url": "https://example.org",
        "year": "2024",
    },
    "aime25": {"problem": "Find the number.", "answer": "70", "id": "0"},
    "math500": {
        "problem": "Find the point.",
        "solution": r"It is $\boxed{\left( 3, \frac{\pi}{2} \right)}.$",
        "answer": r"\left( 3, \frac{\pi}{2} \right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    },
    "gsm8k": {"question": "How many eggs?", "answer": "She sells 16 - 3 - 4 = <<16-3-4=9>>9 and more.\n#### 1,018"},
}
RIGHT = {"aime24": r"\boxed{204}", "aime25": "The answer is 070.", "math500": r"\boxed{(3, \pi/2)}", "gsm8k": "1018 eggs"}
WRONG = {"aime24": r"\boxed{24}", "aime25": "70", "math500": r"\boxed{(\pi/2, 3)}", "gsm8k": "1018 or 9 eggs"}


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> TextTools:
    return text_tools(tokenizer)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(name: str, data: Path | str | None, text: TextTools, **options: Any) -> list[Example]:
    return SUITES[name](data if data is None else str(data), **options)[0].examples(length=None, n=100, seed=0, text=text)


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_problems_and_answers_are_scored(tmp_path: Path, text: TextTools, name: str) -> None:
    wrapped = TextTools(text.count_tokens, lambda message: f"<user>{message}<assistant>", text.truncate_middle)
    data = write(tmp_path / "test.jsonl", [ROWS[name]])
    (example,) = examples(name, data, wrapped)
    statement = ROWS[name].get("problem") or ROWS[name]["question"]
    assert example.prompt.startswith(f"<user>{statement}") and r"\boxed{}" in example.prompt
    (task,) = SUITES[name](str(data))
    assert (task.suite, task.name) == (name, name) == (example.suite, example.task)
    assert task.score(example, f"I think so.\n{RIGHT[name]}") == {"score": 1.0, "answered": 1.0}
    assert task.score(example, WRONG[name])["score"] == 0.0
    assert task.score(example, "I do not know") == {"score": 0.0, "answered": 0.0}


def test_other_names_and_missing_answers_of_the_same_fields(tmp_path: Path, text: TextTools) -> None:
    rows = {
        "aime25": {"question": "Find it.", "answer": r"336^\circ"},
        "aime24": {"ID": "2024-II-4", "Problem": "Find it.", "Solution": "", "Answer": 33},
        "aime24 of a table": {"problem": "Find it.", "answer": 33.0},
        "math500 of a table": {"problem": "Find it.", "answer": 0.5},
        "math500": {"problem": "Find it.", "solution": r"so $\boxed{\frac{1}{2}}$", "level": "Level 5", "type": "Algebra"},
    }
    found = {
        name: examples(name.split()[0], write(tmp_path / f"{name}.jsonl", [row]), text)[0].references[0]
        for name, row in rows.items()
    }
    assert found == {
        "aime25": r"336^\circ",
        "aime24": "33",
        "aime24 of a table": "33",
        "math500 of a table": "0.5",
        "math500": r"\frac{1}{2}",
    }


def test_directories_as_the_hub_lays_them_out(tmp_path: Path, text: TextTools) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part in ("main", "socratic"):
        for split in ("train", "test"):
            path = tmp_path / "gsm8k" / part / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {"question": f"{part} {split}?", "answer": "so\n#### 3"}
            parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (example,) = examples("gsm8k", tmp_path / "gsm8k", text)
    assert "main test?" in example.prompt
    for part in ("I", "II"):
        write(tmp_path / "aime25" / f"aime2025-{part}.jsonl", [{"question": f"{part}-{i}", "answer": "1"} for i in range(15)])
    drawn = examples("aime25", tmp_path / "aime25", text)
    assert len(drawn) == len({example.key for example in drawn}) == 30


def test_the_hub_is_asked_for_the_right_parts(text: TextTools, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    module = ModuleType("datasets")

    def load_dataset(*names: str, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        return [ROWS["gsm8k" if "gsm8k" in names[0] else "aime25"]]

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    for name, data in (
        *((name, None) for name in ("aime24", "aime25", "gsm8k", "math500")),
        ("aime25", "opencompass/AIME2025"),
        ("math500", "some-one/other_set/part:train"),
    ):
        examples(name, data, text)
    assert asked == [
        ("HuggingFaceH4/aime_2024", "train"),
        ("math-ai/aime25", "test"),
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", "test"),
        ("opencompass/AIME2025", "AIME2025-I", "test"),
        ("opencompass/AIME2025", "AIME2025-II", "test"),
        ("some-one/other_set", "part", "train"),
    ]


def test_answers_get_what_the_model_has_room_for(tmp_path: Path, tokenizer: Any, text: TextTools) -> None:
    data = write(tmp_path / "a.jsonl", [ROWS["aime24"]])
    assert examples("aime24", data, text)[0].max_tokens == 32768
    (example,) = examples("aime24", data, text, max_length=500)
    assert 484 <= len(tokenizer(example.prompt)["input_ids"]) + example.max_tokens <= 500
    assert examples("aime24", data, text, max_length=20)[0].max_tokens == 1  # the prompt alone is longer
    (task,) = SUITES["aime24"](str(data), max_length=500)
    with pytest.raises(LengthError, match=r"line 1 of .*a.jsonl has no room for an answer"):
        task.examples(length=20, n=1, seed=0, text=text)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("aime24", {"problem": "p", "answer": "1000"}, "the answer '1000' is no whole number from 0 to 999"),
        ("aime24", {"problem": "p", "answer": "x"}, "line 1 of .*: the answer 'x' is no whole number"),
        ("aime24", {"problem": "p", "answer": None}, "field 'answer' must be a text, not null"),
        ("math500", {"problem": "p", "solution": "none"}, r"field 'solution' has no \\boxed"),
        ("math500", {"prompt": "p", "answer": "1"}, "there is no field 'problem' or 'question' or 'Problem' or 'Question'"),
        ("math500", {"problem": " ", "answer": "1"}, "field 'problem' is empty"),
        ("gsm8k", {"question": "q", "answer": "18"}, "field 'answer' has no result behind '####'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: TextTools, name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFileError, match=message):
        examples(name, write(tmp_path / "bad.jsonl", [row]), text)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "{5}"),
        (r"\boxed{x = \fbox{3}}", "x = {3}"),
        (r"\boxed{ \boxed{5}", "5"),
        (r"\boxed{1}, \boxed{\fbox 2}", "1, 2"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"it is \boxed 7.", "7"),
        (r"\boxed{5}, that is \boxed{ }", "5"),
        (r"\boxed{}", None),
        (r"\fbox{9}", "9"),
        (r"so $\boxed{2}$ and $\boxed{6}$.", "2, 6"),
        (r"\boxed{1}, \boxed{2}, \text{ and } \boxed{3}", "1, 2, 3"),
        (r"\(\boxed{x = 1} \quad \text{or} \quad \boxed{x = 2}\)", "x = 1, x = 2"),
        (r"\boxed{5}" + "\n\nSo the answer is $\\boxed{5}$", "5"),
        ("The final answer is: **42**. Good.", "42"),
        ("The answer is 3.\nNo, the answer is $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("#### 1,234", "1,234"),
        ("Answer: 3.5 metres", "3.5 metres"),
        ("5 + 6 = 11", None),
        ("", None),
    ],
)
def test_final_answers(output: str, answer: str | None) -> None:
    assert final_answer(output) == answer


def test_the_last_number_is_taken_where_asked() -> None:
    assert final_answer("she has 3, he has $1,200.50.", or_last_number=True) == "1,200.50"
    assert final_answer("from 10-5 comes 5", or_last_number=True) == "5"
    assert final_answer("so it is -5", or_last_number=True) == "-5"
