"""The table of models in the documents is that of the tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_the_table_of_models_is_what_is_tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import models_table

    assert models_table.main(["--check"]) == 0, capsys.readouterr().out
    text = models_table.DOCUMENT.read_text()
    old = tmp_path / "models.md"
    old.write_text(text.replace("| `GPT2LMHeadModel` |", "| `GPT1LMHeadModel` |"))
    monkeypatch.setattr(models_table, "DOCUMENT", old)
    assert models_table.main(["--check"]) == 1
    assert models_table.main([]) == 0 and old.read_text() == text
