"""Data sets by name through the package `datasets` itself, from directories in the forms that the Hub has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specontext.distill.data import open_sources
from specontext.distill.data.source import DataError
from specontext.errors import HubError
from specontext.evaluation.suites.data_files import DataFileError, HubData
from specontext.evaluation.suites.math import math_suite
from specontext.hub import COPIES, load_split

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")

ROWS = [{"question": f"How many are {n}?", "answer": f"so\n#### {n}"} for n in range(3)]
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: test, path: socratic/test-*}
---
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data sets of the organisation `org`; the Hub is out of reach."""
    for part, split in (("main", "train"), ("main", "test"), ("socratic", "test")):
        path = tmp_path / "org" / "subsets" / part / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    (tmp_path / "org" / "subsets" / "README.md").write_text(CARD)
    (tmp_path / "org" / "lines").mkdir()
    (tmp_path / "org" / "lines" / "train.jsonl").write_text("".join(json.dumps({"body": f"text {n}"}) + "\n" for n in range(3)))
    (tmp_path / "org" / "scripted").mkdir()
    (tmp_path / "org" / "scripted" / "scripted.py").write_text("raise SystemExit('a loading script was run')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_parquet_and_json_lines_load_by_subset_and_split(tokenizer: Any) -> None:
    rows = HubData("org/subsets", "main", "test[:2]").rows()
    assert [row.fields for row in rows] == ROWS[:2] and rows[0].where == "row 1 of org/subsets/main:test[:2]"
    source = open_sources(["hf:org/lines:train:body", "hf:org/subsets/socratic:test:question"], tokenizer=tokenizer, seed=0)
    assert "text" in tokenizer.decode(source.draw(0, 32, 8).ids.flatten())


LOADERS: dict[str, Callable[[str, str | None, str, Any], object]] = {
    "eval": lambda name, subset, split, tokenizer: HubData(name, subset, split).rows(),
    "distill": lambda name, subset, split, tokenizer: open_sources(
        [f"hf:{name}{f'/{subset}' if subset else ''}:{split}"], tokenizer=tokenizer, seed=0
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("name", "subset", "split", "message"),
    [
        (
            "org/scripted",
            None,
            "test",
            r"it is kept as a loading script \(scripted.py\), which .* no longer runs; name a copy .*: hf download",
        ),
        ("org/subsets", None, "test", "it has several subsets, write org/subsets/SUBSET: main, socratic"),
        ("org/subsets", "other", "test", "it has no subset 'other', its subsets are: main, socratic"),
        ("org/subsets", "main", "valid", "it has no split 'valid', write :SPLIT behind the name, one of: train, test"),
        ("org/nowhere", None, "test", "the Hub cannot be reached, and there is no copy here"),
    ],
)
def test_what_does_not_load_says_why_and_what_would(
    loader: str, name: str, subset: str | None, split: str, message: str, tokenizer: Any
) -> None:
    with pytest.raises((DataError, DataFileError), match=f"cannot load .*: {message}") as caught:
        LOADERS[loader](name, subset, split, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found pg19.py"), "name its copy emozilla/pg19, or download"),
        (ValueError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated"), "gated; ask for access at https"),
        (ValueError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), "none of that name, or it is private"),
        (ValueError("two\n  lines"), "^two lines$"),
        (ValueError(), "^ValueError$"),
    ],
)
def test_errors_of_the_hub_become_advice(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str, split: str) -> object:
        raise error

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(HubError, match=message):
        load_split("deepmind/pg19", None, "train", extra="datasets")


def test_copies_are_no_scripts_themselves() -> None:
    assert not set(COPIES.values()) & set(COPIES)


def test_a_folder_with_nothing_but_a_script_is_refused(here: Path) -> None:
    with pytest.raises(DataFileError, match=r"kept as a loading script \(scripted.py\), which is not run: give rows as .jsonl"):
        math_suite("gsm8k", str(here / "org" / "scripted"))


def test_other_columns_are_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no field 'title': its fields are body"):
        open_sources(["hf:org/lines:train:title"], tokenizer=tokenizer, seed=0)
    with pytest.raises(DataError, match=r"row 0 of hf:org/lines has 'body'; understood are rows with"):
        open_sources(["hf:org/lines"], tokenizer=tokenizer, seed=0)
    source = HubData("org/lines", None, "train")
    with pytest.raises(DataFileError, match="there is no field 'problem' or 'question'; the fields are body"):
        source.rows()[0].text("problem", "question")


def test_the_hubs_own_conversion_loads_from_a_directory(here: Path, tokenizer: Any) -> None:
    """SUBSET/SPLIT/0000.parquet: the test rows of the main part for evaluation, all but those held out for training."""
    for part in ("main", "socratic"):
        for split in ("train", "test"):
            path = here / "converted" / part / split / "0000.parquet"
            path.parent.mkdir(parents=True)
            rows = [{"question": f"{part} {split}", "answer": "#### 1", "text": f"{part} {split}"}]
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (task,) = math_suite("gsm8k", str(here / "converted"))
    assert [row.fields["question"] for row in task.rows] == ["main test"]  # type: ignore[attr-defined]
    drawn = open_sources([str(here / "converted")], tokenizer=tokenizer, seed=0).draw(0, 64, 4)
    assert "socratic test" in tokenizer.decode(drawn.ids.flatten())
    (here / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"cannot read .*broken.parquet: "):
        open_sources([str(here / "broken.parquet")], tokenizer=tokenizer, seed=0)


def test_where_nobody_watches_nothing_is_drawn(here: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{"text": f"apple {n} " * 20} for n in range(3)]), here / "rows.parquet")
    open_sources([str(here / "rows.parquet")], tokenizer=tokenizer, seed=0).draw(0, 16, 1)
    assert capfd.readouterr().err == ""
