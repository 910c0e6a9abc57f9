"""LongBench: files in upstream's layouts, prompts that fit, metrics by hand and as upstream computes them, and bad data."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from specontext.evaluation.suites import SUITES, EvalTask, TextTools
from specontext.evaluation.suites.data_files import DataFileError, data_files
from specontext.evaluation.suites.longbench_metrics import METRICS
from specontext.evaluation.suites.longbench_tasks import EVEN_TASKS, TASKS
from specontext.evaluation.text_tools import text_tools
from specontext.tasks import LengthError

ANSWERS = {"passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3", "passage_count": "7", "trec": "Human being"}


def record(name: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    """A line as upstream writes it."""
    classes = ["Human being", "Human", "Abbreviation"] if name in ("trec", "lsht") else None
    fields = {
        "input": f"question {number}?",
        "context": f"CONTEXT-{number} " + "the red cat sat on a mat. " * 40,
        "answers": [ANSWERS.get(name, "Human being" if classes else "a red cat")],
        "length": 240,
        "dataset": name,
        "language": "zh" if "zh" in name else "en",
        "all_classes": classes,
        "_id": f"{number:048x}",
    }
    return fields | changes


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in records), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All tasks of both suites, three problems each, as in upstream's data.zip."""
    for name in TASKS:
        write(tmp_path / "data" / f"{name}.jsonl", [record(name, i) for i in range(3)])
    for name in EVEN_TASKS:
        write(tmp_path / "data" / f"{name}_e.jsonl", [record(name, i, length=3999 + 2000 * i, dataset=name) for i in range(3)])
    return tmp_path


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> TextTools:
    return text_tools(tokenizer)


@pytest.fixture
def jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that makes a word of every character."""
    module = ModuleType("jieba")
    module.cut = lambda text, cut_all: iter(text)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jieba", module)


def task_of(suite: str, data: Path, name: str, **options: Any) -> EvalTask:
    return next(task for task in SUITES[suite](str(data), **options) if task.name == name)


def test_all_tasks_ask_with_input_and_context(folder: Path, text: TextTools, jieba: None) -> None:
    tasks = SUITES["longbench"](str(folder))
    assert [task.name for task in tasks] == list(TASKS)
    for task in tasks:
        examples = task.examples(length=None, n=10, seed=0, text=text)
        assert len({example.key for example in examples}) == 3
        for example in examples:
            number = int(example.key.split("-")[1], 16)
            assert f"CONTEXT-{number} " in example.prompt
            asks_nothing = task.name in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
            assert (f"question {number}?" in example.prompt) != asks_nothing
            assert example.max_tokens == TASKS[task.name].max_tokens and example.suite == "longbench"
            assert task.score(example, example.references[0])["score"] == pytest.approx(1.0)
            assert task.score(example, "~")["score"] == 0.0


def test_a_zip_a_folder_and_parquet_hold_the_same(folder: Path, tmp_path: Path, text: TextTools) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((folder / "data").iterdir()):
            file.write(path, f"data/{path.name}")
    table = tmp_path / "hub" / "qasper" / "test-00000-of-00001.parquet"
    table.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([record("qasper", i) for i in range(3)]), table)
    converted = tmp_path / "converted" / "qasper" / "test" / "0000.parquet"  # as the Hub's own conversion lies
    converted.parent.mkdir(parents=True)
    converted.write_bytes(table.read_bytes())
    places = [folder / "data", archive, tmp_path / "hub", tmp_path / "converted", folder / "data" / "qasper.jsonl"]
    seen = [task_of("longbench", place, "qasper").examples(length=None, n=3, seed=0, text=text) for place in places]
    assert all(examples == seen[0] for examples in seen)


def test_longbench_e_has_thirteen_tasks_and_means_by_length(folder: Path, text: TextTools) -> None:
    tasks = SUITES["longbench-e"](str(folder))
    assert [task.name for task in tasks] == [f"{name}_e" for name in EVEN_TASKS]
    examples = tasks[0].examples(length=None, n=3, seed=0, text=text)
    classes = {example.details["words"]: set(tasks[0].score(example, "red cat")) for example in examples}
    assert classes == {3999: {"score", "0-4k"}, 5999: {"score", "4-8k"}, 7999: {"score", "4-8k"}}


def test_more_problems_keep_the_fewer_and_seeds_differ(tmp_path: Path, text: TextTools) -> None:
    write(tmp_path / "qasper.jsonl", [record("qasper", i) for i in range(30)])
    task = task_of("longbench", tmp_path, "qasper")
    few, many, others = (
        [example.key for example in task.examples(length=None, n=n, seed=seed, text=text)]
        for n, seed in ((5, 0), (20, 0), (20, 1))
    )
    assert many[:5] == few and others != many


@pytest.mark.parametrize("name", ["qasper", "trec"])
def test_long_prompts_lose_their_middle_and_keep_both_ends(tmp_path: Path, tokenizer: Any, text: TextTools, name: str) -> None:
    write(tmp_path / f"{name}.jsonl", [record(name, context="START " + "the red cat sat on a mat. " * 400 + " END")])
    task = task_of("longbench", tmp_path, name, max_length=2000)
    whole = task_of("longbench", tmp_path, name).examples(length=None, n=1, seed=0, text=text)[0]
    for length, bound in ((None, 2000), (512, 512), (4000, 2000)):
        example = task.examples(length=length, n=1, seed=0, text=text)[0]
        tokens = len(tokenizer(example.prompt)["input_ids"]) + example.max_tokens
        assert bound - 16 <= tokens <= bound and example.length == length
        assert example.prompt[:40] == whole.prompt[:40] and example.prompt[-40:] == whole.prompt[-40:]


def test_only_prompts_that_are_questions_get_the_chat_template(tmp_path: Path, text: TextTools) -> None:
    for name in ("qasper", "samsum", "lcc"):
        write(tmp_path / f"{name}.jsonl", [record(name)])
    wrapped = TextTools(text.count_tokens, lambda message: f"<user>{message}<assistant>", text.truncate_middle)
    for task in SUITES["longbench"](str(tmp_path)):
        prompt = task.examples(length=None, n=1, seed=0, text=wrapped)[0].prompt
        assert prompt.startswith("<user>") == prompt.endswith("<assistant>") == (task.name == "qasper")


def test_a_length_without_room_is_refused(tmp_path: Path, text: TextTools) -> None:
    write(tmp_path / "qasper.jsonl", [record("qasper")])
    with pytest.raises(LengthError, match=r"line 1 of .*qasper.jsonl has no room for an answer of 128 tokens"):
        task_of("longbench", tmp_path, "qasper").examples(length=150, n=1, seed=0, text=text)


def test_chinese_tasks_without_jieba_are_left_out_by_name(
    tmp_path: Path, text: TextTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    for name in ("multifieldqa_zh", "lsht"):
        write(tmp_path / f"{name}.jsonl", [record(name)])
    needs, not_ = SUITES["longbench"](str(tmp_path))
    assert "jieba" in needs.unfit(text) and not_.unfit(text) is None  # type: ignore[attr-defined]
    with pytest.raises(DataFileError, match=r"jieba: .*pip install"):
        needs.examples(length=None, n=1, seed=0, text=text)


# Values of upstream's metrics.py with rouge 1.0.1 and fuzzywuzzy 0.18.
@pytest.mark.parametrize(
    ("metric", "output", "answer", "expected"),
    [
        ("qa_f1", "The Red cat, sat!", "a red cat", 0.8),
        ("qa_f1", "", "cat", 0.0),
        ("rouge", "the cat sat. on the mat", "on the mat the cat sat.", 0.9999999950000001),
        ("rouge", "a b c d", "b a d c", 0.49999999500000003),
        ("rouge", "...", "a", 0.0),
        ("count", "There are 7, not 17 or 7.", "7", 2 / 3),
        ("retrieval", "Paragraph 12 or Paragraph 3", "Paragraph 3", 0.5),
        ("retrieval_zh", "段落3", "段落3", 1.0),
        ("code_similarity", "\n# note\n```\nreturn x + 1\nreturn y", "return x + 2", 0.92),
        ("code_similarity", "// only a comment", "return x", 0.0),
    ],
)
def test_metrics(metric: str, output: str, answer: str, expected: float) -> None:
    assert METRICS[metric](output, answer, ()) == pytest.approx(expected, abs=1e-12)


def test_classification_divides_by_the_classes_named() -> None:
    classes = ["Human", "Human being", "Abbreviation", "City"]
    score = METRICS["classification"]
    assert score("Type: Human being", "Human being", classes) == 1.0  # "Human" is part of the right one
    assert score("Human being or City", "Human being", classes) == 0.5
    assert score("City", "Human being", classes) == 0.0
    assert score("abcd", "abcd", ["a", "ab", "abcd"]) == 0.5  # of two neighbours upstream removes the first only


def test_few_shot_answers_end_at_their_first_line(tmp_path: Path, text: TextTools) -> None:
    for name in ("triviaqa", "qasper"):
        write(tmp_path / f"{name}.jsonl", [record(name)])
    scores = {}
    for task in SUITES["longbench"](str(tmp_path)):
        example = task.examples(length=None, n=1, seed=0, text=text)[0]
        scores[task.name] = task.score(example, "\nred cat\nPassage: something else")["score"]
    assert scores == {"triviaqa": 1.0, "qasper": pytest.approx(4 / 7)}


def test_chinese_answers_are_scored_by_words(jieba: None) -> None:
    assert METRICS["qa_f1_zh"]("我们，去。", "我们来", ()) == pytest.approx(2 / 3)
    assert METRICS["rouge_zh"]("我们去", "我们来", ()) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 of .*qasper.jsonl is no JSON"),
        ('{"a": ' + "[" * 100_000, r"line 2 of .* is no JSON: .*recursion"),
        ('{"a": ' + "9" * 5000 + "}", r"line 2 of .* is no JSON"),
        ("[1]", r"line 2 of .* must be a JSON object, not \[1\]; each row must be an object in a line of its own"),
        ({"answers": []}, r"line 2 of .*: field 'answers' must be a list of texts"),
        ({"answers": [3]}, r"field 'answers' must hold texts only, not 3"),
        ({"context": None}, r"line 2 of .*: field 'context' must be a text, not null"),
        ({"length": "240"}, r"field 'length' must be a whole number, not \"240\""),
        ({"_id": "a\ud800"}, r"line 2 of .* has half of a character \(\\ud800\)"),
        ({"dataset": "lcc"}, r"field 'dataset' says 'lcc', but the data is read as 'qasper'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: TextTools, line: Any, message: str) -> None:
    good = json.dumps(record("qasper"))
    bad = line if isinstance(line, str) else json.dumps(record("qasper", 1) | line)
    (tmp_path / "qasper.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(DataFileError, match=message):
        task_of("longbench", tmp_path, "qasper").examples(length=None, n=1, seed=0, text=text)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_rows_in_another_encoding_are_named(encoding: str, tmp_path: Path, text: TextTools) -> None:
    rows = json.dumps(record("qasper") | {"input": "café"}, ensure_ascii=False)
    (tmp_path / "qasper.jsonl").write_text(rows, encoding=encoding)
    with pytest.raises(DataFileError, match=r"line 1 of .* is not UTF-8 text: byte \d+ cannot .*; convert the file to UTF-8"):
        task_of("longbench", tmp_path, "qasper").examples(length=None, n=1, seed=0, text=text)


def test_a_missing_field_and_classes_and_paragraphs_are_named(tmp_path: Path, text: TextTools) -> None:
    lacking = {key: value for key, value in record("lcc").items() if key != "_id"}
    cases = {
        "lcc": (lacking, "there is no field '_id'; the fields are input, context"),
        "trec": (record("trec", all_classes=None), "field 'all_classes' must be a list of texts, not null"),
        "passage_retrieval_en": (record("passage_retrieval_en", answers=["3"]), "line 1 of .*'3' names no paragraph"),
    }
    for name, (fields, message) in cases.items():
        write(tmp_path / name / f"{name}.jsonl", [fields])
        with pytest.raises(DataFileError, match=message):
            task_of("longbench", tmp_path / name, name).examples(length=None, n=1, seed=0, text=text)


def test_places_without_data_are_refused(tmp_path: Path, text: TextTools, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other" / "questions.jsonl", [record("qasper")])
    write(tmp_path / "twice" / "a" / "lcc.jsonl", [record("lcc")])
    write(tmp_path / "twice" / "b" / "lcc.jsonl", [record("lcc")])
    (tmp_path / "broken.zip").write_text("no archive")
    (tmp_path / "notes.txt").write_text("")
    for place, message in (
        ("empty", "there is no .jsonl, .ndjson or .parquet file in"),
        ("other", "has no file of longbench: its files are called narrativeqa.jsonl"),
        ("twice", "has 'lcc' twice"),
        ("broken.zip", "cannot read .*broken.zip"),
        ("notes.txt", "notes.txt is no data file"),
        ("absent.jsonl", "no file or directory at"),
    ):
        with pytest.raises(DataFileError, match=message):
            SUITES["longbench"](str(tmp_path / place))
    with pytest.raises(DataFileError, match=r"THUDM/LongBench has no task 'nosuch'"):
        SUITES["longbench"]("THUDM/LongBench/nosuch")
    write(tmp_path / "blank" / "lcc.jsonl", [])
    with pytest.raises(DataFileError, match=r"lcc.jsonl has no rows"):
        task_of("longbench", tmp_path / "blank", "lcc").examples(length=None, n=1, seed=0, text=text)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataFileError, match=r"some-one/LongBench/lcc:test needs the package datasets: .*pip install"):
        SUITES["longbench"]("some-one/LongBench/lcc")[0].examples(length=None, n=1, seed=0, text=text)


@pytest.mark.parametrize("data", [None, "THUDM/LongBench", "zai-org/LongBench", "hf:THUDM/LongBench/lcc"])
def test_the_authors_data_set_is_read_from_its_archive(
    folder: Path, text: TextTools, monkeypatch: pytest.MonkeyPatch, data: str | None
) -> None:
    archive = folder / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((folder / "data").iterdir()):
            file.write(path, f"data/{path.name}")
    asked: list[tuple[str, ...]] = []

    def download(name: str, file: str, *, repo_type: str) -> str:
        asked.append((name, file, repo_type))
        return str(archive)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(sys.modules, "datasets", None)  # is not needed
    tasks = SUITES["longbench"](data)
    assert [task.name for task in tasks] == (["lcc"] if data and data.endswith("lcc") else list(TASKS)) and not asked
    for suite, name in (("longbench", "lcc"), ("longbench-e", "lcc_e")):
        chosen = SUITES[suite](None if data is None else data.replace("/lcc", f"/{name}"))
        task = next(task for task in chosen if task.name == name)
        assert len(task.examples(length=None, n=5, seed=0, text=text)) == 3
    assert asked == [("zai-org/LongBench", "data.zip", "dataset")] * 2
    with pytest.raises(DataFileError, match="THUDM/LongBench has no split 'train', only 'test'"):
        SUITES["longbench"]("THUDM/LongBench/lcc:train")


def test_an_archive_that_cannot_be_had_is_named(text: TextTools, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, file: str, *, repo_type: str) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(DataFileError, match=r"cannot download data.zip of .*zai-org/LongBench: the Hub cannot be reached"):
        SUITES["longbench"](None)[0].examples(length=None, n=1, seed=0, text=text)


def test_the_hub_is_asked_for_the_task_s_own_subset(text: TextTools, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    module = ModuleType("datasets")

    def load_dataset(*names: str, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        return [record(names[1].removesuffix("_e"), i) for i in range(2)]

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [task.name for task in SUITES["longbench"]("some-one/LongBench")] == list(TASKS)
    for suite, name in (("longbench", "lcc"), ("longbench-e", "lcc_e")):
        task = next(task for task in SUITES[suite]("some-one/LongBench") if task.name == name)
        assert len(task.examples(length=None, n=5, seed=0, text=text)) == 2
    assert asked == [("some-one/LongBench", "lcc", "test"), ("some-one/LongBench", "lcc_e", "test")]


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.ndjson"])
def test_rows_under_other_endings(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a": 1}\n{"a": 2}\n')
    for path in (tmp_path / name, tmp_path):
        assert [row.number("a") for file in data_files(path) for row in file.rows()] == [1, 2]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_broken_archives_are_named(tmp_path: Path, method: int) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("qasper.jsonl", json.dumps(record("qasper")) * 20)
    content = bytearray(path.read_bytes())
    for place in range(46, 80):
        content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=r"cannot read .*data\.zip"):
        [file.rows() for file in data_files(path)]
