"""What shells complete: verbs and options, each on a line of its own."""

from __future__ import annotations

import re

import pytest

from specontext.cli import main

VERBS = {"generate", "serve", "deploy", "chat", "demo", "distill", "eval", "plan", "report", "tasks", "head", "bench"}


class Shell:
    """Completions as a shell asks for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._set, self._read = monkeypatch.setenv, capsys.readouterr
        self._set("COLUMNS", "80")

    def ask(self, shell: str, line: str) -> list[str]:
        """The words that a shell would offer behind a line."""
        self._set("_SPECONTEXT_COMPLETE", f"complete_{shell}")
        self._set("COMP_WORDS", line)
        self._set("COMP_CWORD", str(len(line.split(" ")) - 1))
        self._set("_TYPER_COMPLETE_ARGS", line)
        self._set("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        self._set("_TYPER_COMPLETE_WORD_TO_COMPLETE", line.split(" ")[-1])
        assert main([]) == 0
        lines = self._read().out.rstrip("\n").split("\n")
        if shell == "zsh":
            lines = "\n".join(lines).removeprefix("_arguments '*: :((").removesuffix("))'").split("\n")
        return [re.split(r"\t|:::|(?<=\"):", each)[0].strip('"') for each in lines if each]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.mark.parametrize("name", ["bash", "zsh", "fish", "powershell"])
def test_completions(shell: Shell, name: str) -> None:
    assert set(shell.ask(name, "specontext ")) == VERBS
    assert shell.ask(name, "specontext se") == ["serve"]
    for verb in ("serve", "deploy", "eval", "report", "head calibrate", "bench serve"):
        found = shell.ask(name, f"specontext {verb} --")
        assert all(re.fullmatch(r"--[a-z0-9-]+", each) for each in found), found
        assert len(found) == len(set(found)) > 5
    assert shell.ask(name, "specontext serve nano --api") == ["--api-key"]


@pytest.mark.parametrize("name", ["bash", "zsh", "fish", "powershell"])
def test_scripts(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("_SPECONTEXT_COMPLETE", f"source_{name}")
    assert main([]) == 0
    script = capsys.readouterr().out
    assert f"complete_{name}" in script and "specontext" in script
