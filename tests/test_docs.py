"""Samples of README and docs: verbs and options exist, Python imports what there is, bodies are what the server takes."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from specontext.cli.app import app
from specontext.memory.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PLACES = (0, 1)  # of the program among the words of a line: first, or behind a directory or a variable
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(match[1], match[2], id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 2}")
    for page in PAGES
    for match in _BLOCK.finditer(page.read_text())
]


def test_there_are_samples() -> None:
    assert len([block for block in BLOCKS if block.values[0] == "python"]) > 5
    assert len([block for block in BLOCKS if block.values[0] == "bash"]) > 10


@pytest.mark.parametrize(("kind", "text"), [block for block in BLOCKS if block.values[0] == "python"])
def test_python(kind: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "specontext":
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            known = getattr(importlib.import_module("specontext"), node.func.id, None)
            fields = getattr(known, "__dataclass_fields__", None)
            if fields is not None:
                assert [word.arg for word in node.keywords if word.arg not in fields] == []


@pytest.mark.parametrize(("kind", "text"), [block for block in BLOCKS if block.values[0] in ("bash", "sh", "shell")])
def test_commands(kind: str, text: str) -> None:
    for words in commands(text):
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            assert words[0] in command.commands, f"no verb {words[0]}"
            command = command.commands[words.pop(0)]
        if command.name == "plan" and words and "/" not in words[0] and words[0].islower() and not words[0].startswith("-"):
            assert words[0] in {"nano", "smollm2", *PRESETS}
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "-h"}
        given = [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
        assert [name for name in given if name not in known] == []
    for body in re.findall(r"curl [^\n]*/v1/chat/completions.*? -d '(.*?)'", text, re.DOTALL):
        from specontext.server.protocol.chat import ChatRequest

        ChatRequest.model_validate(json.loads(body))


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `specontext` command of a block."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # amid a quoted text that goes on
            continue
        while "specontext" in words and words.index("specontext") in _PLACES:
            words = words[words.index("specontext") + 1 :]
            end = next(
                (place for place, word in enumerate(words) if word in ("|", ">", "&&", ";", "&") or ">" in word), len(words)
            )
            yield words[:end]
