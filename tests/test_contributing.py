"""What CONTRIBUTING.md says about new methods: one file and one line, and everything knows it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import specontext
from tests.conftest import path_with

PACKAGE = Path(specontext.__file__).parent
PAGE = PACKAGE.parent / "CONTRIBUTING.md"
RUN = """
from typer.testing import CliRunner
from specontext.cli.app import app

def run(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--sink", "2", "--recent", "4", "--device", "cpu"])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout

print(run("generate", "nano", "--prompt", "one two three " * 40, "--method", "every-other", "--budget", "32", "--max-tokens", "4",
          "--ignore-eos", "--json"))
run("eval", "nano", "--suite", "ruler", "--tasks", "niah_single", "--lengths", "256", "--limit", "1", "--budgets", "48",
    "--methods", "full,every-other", "--out", "results")
"""


def method_of(page: str) -> tuple[str, str]:
    """The page's file and line."""
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [line] = re.findall(r"```\n(Method\(.*\),)\n```", page)
    return code, line


def with_new_method(target: Path, code: str, line: str) -> None:
    """The package with one more file and one more line; everything else is where it was."""
    (target / "specontext" / "retrieval" / "methods").mkdir(parents=True)
    for folder in ("", "retrieval", "retrieval/methods"):
        for path in (PACKAGE / folder).iterdir():
            link = target / "specontext" / folder / path.name
            if not link.exists():
                link.symlink_to(path)
    registry = target / "specontext" / "retrieval" / "registry.py"
    registry.unlink()
    text = (PACKAGE / "retrieval" / "registry.py").read_text()
    assert text.count("\n)\n\nFULL") == 1
    registry.write_text(text.replace("\n)\n\nFULL", f"\n    {line}\n)\n\nFULL"))
    (target / "specontext" / "retrieval" / "methods" / "every_other.py").write_text(code)


@pytest.mark.slow
def test_a_method_is_one_file_and_one_line(tmp_path: Path) -> None:
    with_new_method(tmp_path, *method_of(PAGE.read_text()))
    environment = os.environ | path_with(tmp_path) | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    stats = json.loads(ran.stdout)["stats"]
    assert stats["method"] == "every-other" and stats["tokens_read_per_step"] == 32
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"full", "every-other"}
    assert "every second token" in (tmp_path / "results" / "report.html").read_text()
