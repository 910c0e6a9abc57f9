"""Whoever follows a decode step reads few files, in one direction."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


def test_a_decode_step_goes_through_few_files_and_functions(capsys: pytest.CaptureFixture[str]) -> None:
    import step_map

    step_map.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == len(found["map"]) <= 25
    assert found["functions"] == sum(map(len, found["map"].values())) <= 100
    assert found["changes"] <= found["calls"] <= 270
    for file in ("engine/decode.py", "kv/cache.py", "kv/transfers.py", "kernels/rows.py", "kernels/sparse_attention.py"):
        assert file in found["map"], "a step that loads and attends"
    assert "engine/prefill.py" not in found["map"]


def test_the_map_sees_what_a_dense_step_reads_instead() -> None:
    import step_map

    found = step_map.map_step("full")
    assert "kernels/paged_attention.py" in found.files and "kv/hot_slots.py" not in found.files
    assert found.functions < 100 and found.changes < found.calls
