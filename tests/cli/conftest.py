"""Running the command line inside the test process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from specontext.cli import main


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("tasks", "list", stdin=b"..."): words of the command line; the rest of the process is left alone."""

    def call(*words: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Ran(status, *capsys.readouterr())

    return call


@pytest.fixture
def tiny(checkpoint: Callable[[str], Path]) -> Path:
    """A tiny random checkpoint with a retrieval head."""
    return checkpoint("llama")


@pytest.fixture
def fails(run: Run) -> Callable[[Sequence[object]], str]:
    """Runs a command that must fail without a traceback; returns its message."""

    def call(words: Sequence[object], *, stdin: bytes = b"", status: int = 2) -> str:
        ran = run(*words, stdin=stdin)
        assert ran.status == status, ran.stderr
        assert ran.stdout == ""
        assert "Traceback" not in ran.stderr
        message = ran.stderr.splitlines()[-1]
        assert message.lower().startswith("error: ")
        return message

    return call
