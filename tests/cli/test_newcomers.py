"""What somebody meets on the first day: quick plans, chats that can be stopped, hints that fit, places where answers go wrong."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specontext import LLM, ConfigError, SpeContextConfig, installing
from specontext.cli import chat as chat_module
from specontext.cli import main
from specontext.cli.demo import _parting
from specontext.evaluation.solve import Scored
from specontext.tasks import Problem


def test_a_plan_of_a_preset_imports_nothing_heavy() -> None:
    check = "import sys; from specontext.cli import main; main(sys.argv[1:]); "
    check += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    words = ["plan", "llama-3.1-8b", "--gpu-memory", "24GiB", "--dtype", "float16"]
    done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]") and "float16" in done.stdout


def test_ctrl_c_stops_an_answer_and_then_the_chat(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[Any] = []

    async def listing(*_: Any) -> Any:
        return {"data": [{"id": "nano", "max_model_len": 512}]}

    async def say(talk: Any, text: str) -> None:
        asked.append((text, talk.options))
        raise KeyboardInterrupt

    class Lines(io.StringIO):
        def readline(self, *_: Any) -> str:  # type: ignore[override]
            if len(asked) == 2:
                raise KeyboardInterrupt
            return "hello\n"

    monkeypatch.setattr(chat_module.chat.__globals__["asyncio"], "run", _run)
    monkeypatch.setitem(chat_module.chat.__globals__, "fetch_json", listing)
    monkeypatch.setitem(chat_module.chat.__globals__, "_say", say)
    monkeypatch.setattr("sys.stdin", Lines())
    assert main(["chat"]) == 130
    assert asked == [("hello", {"max_tokens": 128})] * 2
    said = capsys.readouterr().err
    assert "generated tasks only" in said and said.count("Ctrl-C again ends the chat") == 2


def _run(coroutine: Any) -> Any:
    """`asyncio.run` without a loop: these coroutines wait for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value


def test_hints_fit_the_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(installing, "editable_source", lambda: tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert installing.install_command("gguf") == ".venv/bin/python -m pip install -e '.[gguf]'"
    monkeypatch.setattr(installing, "editable_source", lambda: None)
    assert installing.install_command("gguf") == ".venv/bin/python -m pip install 'specontext[gguf]'"
    monkeypatch.setenv("PATH", f"/usr/bin{os.pathsep}{tmp_path / '.venv' / 'bin'}")
    assert installing.install_command("gguf") == "pip install 'specontext[gguf]'"


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_an_offload_dir_that_cannot_be_used_is_named(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    if kind == "file":
        folder.write_text("")
    for options in ({}, {"host_memory": 10 << 20}):
        with pytest.raises(ConfigError, match=str(folder)):
            LLM("nano", config=SpeContextConfig(), device="cpu", offload_dir=folder, **options)


def test_a_wrong_program_shows_where_it_parts() -> None:
    right = " ".join(f"v{number} = {number % 7};" for number in range(40))
    problem = Problem("program", "run", right, 1024)
    wrong = Scored(problem, right.replace("v20 = 6;", "v20 = 3;"), "stop", False, 0.9, {})
    assert "at word 63 of 120" in _parting(wrong) and "v20 = 3;" in _parting(wrong) and "v20 = 6;" in _parting(wrong)
    assert _parting(Scored(Problem("niah", "?", "a = 1.", 9), "b", "stop", False, None, {})) == ""
    assert "nothing" in _parting(Scored(problem, "", "stop", False, 0.0, {}))
