"""The house stands: imports run one way, and every method that can be named can be built."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import specontext.config
import specontext.models
from specontext import LLM
from specontext.config import METHODS

PACKAGE = Path(specontext.config.__file__).parent
# A module may import from its own room and from rooms on lower floors.
FLOORS = [
    {"core", "installing"},
    {"checkpoints", "gguf"},
    {"config", "grammars", "hub", "locations", "tasks"},
    {"kernels"},
    {"memory"},
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
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
                yield parts[1], node.lineno


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
        elif other != mine and {mine, other} != FLOORS[0]:
            assert FLOOR_OF[other] < FLOOR_OF[mine], f"{path}:{line}: {mine} may not import {other}"


def test_retrieval_and_kv_do_not_know_each_other() -> None:
    for mine, other in (("retrieval", "kv"), ("kv", "retrieval")):
        for path in (PACKAGE / mine).rglob("*.py"):
            assert other not in {room for room, _ in imports_of(path)}, f"{path} imports {other}"


def test_core_knows_nobody() -> None:
    assert not list(imports_of(PACKAGE / "core.py"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_built_and_lives_in_its_own_file(method: str, make_llm: Callable[..., LLM]) -> None:
    selector = make_llm("llama", method, budget=16).engine.parts.selector
    assert type(selector).__module__ == f"specontext.retrieval.methods.{method.replace('-', '_')}"


def test_every_method_s_file_can_be_named() -> None:
    files = {path.stem for path in (PACKAGE / "retrieval" / "methods").glob("*.py")} - {"__init__"}
    assert files == {method.replace("-", "_") for method in METHODS}
