"""Options from a YAML file are what the same words on the command line would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specontext.cli.config_file import as_defaults, read_options
from specontext.cli.deploy import wanted_of
from specontext.cli.terminal import UsageError


def read(folder: Path, text: str) -> dict[str, Any]:
    (folder / "options.yaml").write_text(text)
    return read_options(str(folder / "options.yaml"))


@pytest.mark.parametrize(
    "written",
    ["1.10", "007", "no", "true", "1:30", "0x20", "1_000", "2026-01-01", "2026-13-45", ".nan", "0b_", "!!int abc", "!!bool x"],
)
def test_texts_without_quotes_are_taken_as_they_stand(tmp_path: Path, written: str) -> None:
    assert read(tmp_path, f"revision: {written}") == {"revision": written.split(" ")[-1]}
    assert read(tmp_path, f"names: [{written}]") == {"names": [written.split(" ")[-1]]}


def test_nulls_and_quotes(tmp_path: Path) -> None:
    assert read(tmp_path, "a:\nb: null\nc: 'null'\nd: \"1.10\"") == {"a": None, "b": None, "c": "null", "d": "1.10"}


@pytest.mark.parametrize("written", ["{a: 1}", "!!binary aGk=", "[[a]]", '"a\\0b"'])
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, written: str) -> None:
    class Option:
        name, multiple = "host", False

    with pytest.raises(UsageError, match="host must"):
        as_defaults(read(tmp_path, f"host: {written}"), [Option], "options.yaml")


@pytest.mark.parametrize("options", [{"max_num_seqs": True}, {"revision": False}, {"method": False}])
def test_truth_values_are_of_flags_alone(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="put a text between quotes"):
        wanted_of({"model": "nano", **options})


def test_flags_take_truth_values(tmp_path: Path) -> None:
    assert wanted_of({"model": "nano", "enforce_eager": True, "enable_prefix_caching": False}).engine.enforce_eager
    assert wanted_of({"model": "nano", **read(tmp_path, "enforce-eager: yes\nmax_num_seqs: 3")}).engine.max_num_seqs == 3
