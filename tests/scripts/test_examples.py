"""Examples run as they are."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_generate_of_hugging_face(capsys: Any) -> None:
    runpy.run_path(str(EXAMPLES / "hf_generate.py"))["main"](["--length", "300", "--budget", "64", "--max-new-tokens", "6"])
    sparse, read, dense = capsys.readouterr().out.splitlines()
    assert sparse == dense and "=" in sparse
    assert read.startswith("each token read 64 of some 2")
