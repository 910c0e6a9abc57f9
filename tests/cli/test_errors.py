"""What a user does wrong ends with one line that says what to do, and a non-zero status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from specontext.cli import main

Fails = Callable[..., str]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "best"], "speculative"),
        (["--budget", "5"], "raise the budget"),
        (["--budget", "64", "--slots", "32"], "slots"),
        (["--granularity", "page"], "batch"),
        (["--dtype", "int4"], "bfloat16"),
        (["--gpu-memory", "12XB"], "24GiB"),
        (["--gpu-memory", "0"], "at least one byte"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--stop", ""], "non-empty"),
        (["--offload-layers", "99"], "offload_layers"),
        (["--device", "abacus"], "cpu"),
        (["--retrieval-head", "none"], "--retrieval-head"),
        (["--retrieval-head", "/no/such/head"], "/no/such/head"),
        (["--no-such-option"], "--no-such-option"),
        (["--budget", "many"], "--budget"),
        (["--retrieval-head", "x" * 5000], "too long"),
        (["--retrieval-head", "~nobody-has-this-name/head"], "home"),
        (["--offload-dir", "x" * 300], "too long"),
    ],
)
def test_bad_options(fails: Fails, tiny: Path, options: list[str], says: str) -> None:
    assert says in fails(["generate", tiny, "--prompt", "the sun", *options])


def test_an_empty_name_is_not_the_current_directory(fails: Fails, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    assert "name of the model is empty" in fails(["plan", "", "--gpu-memory", "1GiB"], status=1)
    assert "name of the model is empty" in fails(["distill", "", "-o", "x", "--data", "tasks"], status=1)
    assert "is empty" in fails(["head", "info", ""])
    assert "is empty" in fails(["head", "prune", tiny, "--target", tiny, "-o", ""])


def test_exactly_one_prompt(fails: Fails, tiny: Path) -> None:
    for prompts in ([], ["--prompt", "a", "-"], ["--prompt", "a", "--prompt-file", "b"], ["--prompt-file", "b", "-"]):
        assert "exactly one prompt" in fails(["generate", tiny, *prompts])
    assert "--prompt TEXT" in fails(["generate", tiny, "text"])


def test_unusable_prompts(fails: Fails, tiny: Path, tmp_path: Path) -> None:
    latin, blank = tmp_path / "latin.txt", tmp_path / "blank.txt"
    latin.write_bytes("café".encode("latin-1"))
    blank.write_bytes(b"\n")
    assert "is empty" in fails(["generate", tiny, "--prompt", ""])
    assert "is empty" in fails(["generate", tiny, "--prompt-file", blank])
    assert "is empty" in fails(["generate", tiny, "-"])
    assert "UTF-8" in fails(["generate", tiny, "--prompt-file", latin])
    assert "UTF-8" in fails(["generate", tiny, "-"], stdin=b"\xff")
    assert "cannot read" in fails(["generate", tiny, "--prompt-file", tmp_path])
    assert "missing.txt" in fails(["generate", tiny, "--prompt-file", tmp_path / "missing.txt"])


def test_standard_streams_that_are_closed_or_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as closed:
        closed.setattr("sys.stdin", None)
        assert main(["generate", "nano", "-"]) == 2
        assert "the prompt is empty" in capsys.readouterr().err
        closed.setattr("sys.stdout", None)
        assert main(["plan", "--list-presets"]) == 0
    stream = open("/dev/full", "w")  # noqa: SIM115
    try:
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["plan", "--list-presets"]) == 1
        assert capsys.readouterr().err.startswith("error: cannot write all of the output: No space left on device; make room")
    finally:
        with suppress(OSError):  # what it still holds fails once more
            stream.close()


def test_prompt_over_the_maximum(fails: Fails, tiny: Path) -> None:
    message = fails(["generate", tiny, "--prompt", " sun" * 40, "--max-model-len", "32", "--method", "full"])
    assert "32" in message


def test_unusable_models(fails: Fails, tiny: Path, tmp_path: Path) -> None:
    assert "no such" in fails(["generate", tmp_path / "no such", "--prompt", "a"], status=1)
    for file in tiny.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "broken" in fails(["generate", tmp_path, "--prompt", "a", "--method", "full"], status=1)


def test_missing_chat_template(fails: Fails, tiny: Path, tmp_path: Path) -> None:
    for file in tiny.glob("*.*"):
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    said = fails(["generate", tmp_path, "--prompt", "a", "--chat", "--method", "full"])
    assert "chat_template.jinja" in said and "leave out --chat" in said and "--chat-template" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "crossword"], "niah_single"),
        (["--task", "niah_multikey", "--length", "8"], "greater length"),
        (["--task", "program", "--length", "8"], "program"),
        (["--task", "program", "--n", "0"], "n must be"),
        ([], "--task"),
    ],
)
def test_bad_tasks(fails: Fails, options: list[str], says: str) -> None:
    assert says in fails(["tasks", "sample", *options])


def test_bad_demos(fails: Fails, tiny: Path) -> None:
    assert "niah_single" in fails(["demo", "--tasks", "crossword"])
    assert "--length" in fails(["demo", "--tasks", "niah_single", "--length", "256", tiny])
    assert "n must be" in fails(["demo", "--tasks", "niah_single", "--problems", "0", tiny])


def test_the_process_itself_shows_no_traceback() -> None:
    words = [sys.executable, "-m", "specontext.cli", "tasks", "sample", "--task", "crossword"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown task 'crossword'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["generate", "x" * 300, "--prompt", "a"], 1),
        (["generate", "/" + "x" * 300, "--prompt", "a"], 1),
        (["head", "info", "x" * 300], 2),
        (["report", "x" * 300], 2),
        (["eval", "nano", "--suite", "longbench", "--data", "x" * 300, "-o", "out"], 2),
        (["distill", "nano", "--data", "~nobody-has-this-name/a.txt", "-o", "out"], 2),
        (["chat", "--prompt", "a", "--base-url", "x" * 100], 1),
    ],
)
def test_paths_and_addresses_that_can_be_none(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails(words, status=status)
    assert any(word in message for word in ("too long", "home")) and len(message) < 400
