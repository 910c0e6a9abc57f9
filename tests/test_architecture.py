"""The house stands: imports run one way, and every method that can be named can be built."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

import pytest

import specontext.config
import specontext.models
from specontext import LLM, SpeContextError
from specontext.retrieval.registry import ENTRIES, METHODS

PACKAGE = Path(specontext.config.__file__).parent
# A module may import from its own room and from rooms on lower floors.
FLOORS = [
    {"errors"},
    {"installing", "layer_sizes", "sampling_params"},
    {"config_entries", "core"},
    {"model_shape"},
    {"checkpoints", "gguf", "retrieval.registry"},
    {"config", "grammars", "hub", "locations", "tasks"},
    {"kernels"},
    {"memory", "quantization"},
    {"kv", "retrieval"},
    {"models"},
    {"engine"},
    {"distill"},
    {"evaluation", "server"},
    {"integrations"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return room_in(path.relative_to(PACKAGE).with_suffix("").parts)


def room_in(parts: Sequence[str]) -> str:
    """A room, or a file that has a floor of its own: the names of the methods, which settings are checked against."""
    return ".".join(parts[:2]) if ".".join(parts[:2]) in FLOOR_OF else parts[0]


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms of this package that a file imports, at any depth of its code, with line numbers."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            module = node.module or ""
            names = [f"specontext.{alias.name}" for alias in node.names] if module == "specontext" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "specontext" and len(parts) > 1:
                yield room_in(parts[1:]), node.lineno


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in FLOOR_OF)


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in modules()} <= set(FLOOR_OF)
    assert len(modules()) > 30


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    mine = room_of(path)
    for other, line in imports_of(path):
        if other not in FLOOR_OF:  # a public name of the package: it comes from below the rooms that use it
            assert FLOOR_OF[mine] > FLOOR_OF["engine"], f"{path}:{line} imports {other} from the package itself"
        elif other != mine:
            assert FLOOR_OF[other] < FLOOR_OF[mine], f"{path}:{line}: {mine} may not import {other}"


def test_retrieval_and_kv_do_not_know_each_other() -> None:
    for mine, other in (("retrieval", "kv"), ("kv", "retrieval")):
        for path in (PACKAGE / mine).rglob("*.py"):
            assert other not in {room for room, _ in imports_of(path)}, f"{path} imports {other}"


def test_an_engine_s_errors_stand_in_one_place() -> None:
    """Rooms of tools have errors of their own."""
    tools = {"distill", "evaluation", "integrations", "server", "cli"}
    for path in modules():
        if room_of(path) not in {*tools, "errors"}:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Error") for base in node.bases):
                    assert not issubclass(getattr(import_module(module_of(path)), node.name), SpeContextError), (
                        f"{path}:{node.lineno}"
                    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_built_and_lives_in_its_own_file(method: str, make_llm: Callable[..., LLM]) -> None:
    selector = make_llm("llama", method, budget=16).engine.parts.selector
    entry = next(entry for entry in ENTRIES if entry.name == method)
    assert type(selector).__module__ == f"specontext.retrieval.methods.{method.replace('-', '_')}" == entry.module


def test_every_method_s_file_can_be_named() -> None:
    files = {path.stem for path in (PACKAGE / "retrieval" / "methods").glob("*.py")} - {"__init__"}
    assert files == {method.replace("-", "_") for method in METHODS}


def test_the_glossary_names_what_is_there() -> None:
    page = (PACKAGE.parent / "docs" / "glossary.md").read_text()
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for name in re.findall(r"`(\w+)`", page):
        assert re.search(rf"\b{name}\b", code), f"docs/glossary.md: {name} is nowhere"
    for path in re.findall(r"`([\w-]+/[\w./-]+)`", page):
        assert (PACKAGE / path).exists(), f"docs/glossary.md: {path} is not there"
