"""A GGUF file is converted once, whole or not at all, and what cannot be kept is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import specontext.gguf.convert as converting
from specontext.errors import GGUFError
from specontext.gguf.cache import cache_folder, converted


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the conversion: writes a config, and notes where."""
    made: list[Path] = []

    def convert(path: Path, folder: Path) -> None:
        made.append(folder)
        (folder / "config.json").write_text(path.read_text())

    monkeypatch.setattr(converting, "convert", convert)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.gguf"
    path.write_text("weights")
    return path


def test_once(file: Path, conversions: list[Path], capsys: Any) -> None:
    folder = converted(file)
    assert (folder / "config.json").read_text() == "weights"
    assert capsys.readouterr().err == f"converting {file} once, into {folder}\n"
    assert converted(file) == folder and len(conversions) == 1
    assert capsys.readouterr().err == ""


def test_another_file_is_converted_anew(file: Path, conversions: list[Path]) -> None:
    first = converted(file)
    file.write_text("Weights")
    assert converted(file) != first and (first / "config.json").read_text() == "weights"


def test_concurrent_starts_convert_once(file: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = threading.Event(), threading.Event()
    quick: Callable[[Path, Path], None] = converting.convert

    def slow(path: Path, folder: Path) -> None:
        started.set()
        assert go.wait(20)
        quick(path, folder)

    monkeypatch.setattr(converting, "convert", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(converted(file))) for _ in range(4)]
    threads[0].start()
    assert started.wait(20)
    for thread in threads[1:]:
        thread.start()
    assert not found
    go.set()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1 and len(found) == 4 and len(set(found)) == 1


def test_a_failed_conversion_leaves_nothing(file: Path, conversions: list[Path], monkeypatch: Any, cache: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(converting, "convert", lambda path, folder: (folder / "model.safetensors").write_text("half") / 0)
        with pytest.raises(ZeroDivisionError):
            converted(file)
    assert [path.name for path in (cache / "gguf").iterdir() if not path.name.endswith(".lock")] == []
    assert (converted(file) / "config.json").is_file()


def test_a_killed_conversion_is_no_trouble(file: Path, conversions: list[Path], cache: Path) -> None:
    code = """if True:
        import os, signal, sys, types
        from pathlib import Path
        from specontext.gguf.cache import converted
        converting = sys.modules["specontext.gguf.convert"] = types.ModuleType("convert")  # without what it imports
        def convert(path, folder):
            (folder / "model.safetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        converting.convert = convert
        converted(Path(sys.argv[1]))
    """
    assert subprocess.run([sys.executable, "-c", code, file], stderr=subprocess.PIPE, timeout=60).returncode != 0
    assert len(list((cache / "gguf").glob(".*.part"))) == 1
    assert sorted(path.name for path in converted(file).iterdir()) == ["config.json", "files.json"]
    assert not list((cache / "gguf").glob(".*.part"))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("wei"), lambda path: shutil.rmtree(path.parent)])
@pytest.mark.parametrize("name", ["config.json", "files.json"])
def test_a_damaged_checkpoint_is_converted_again(
    name: str, damage: Callable[[Path], Any], file: Path, conversions: list[Path]
) -> None:
    folder = converted(file)
    damage(folder / name)
    assert converted(file) == folder and (folder / "config.json").read_text() == "weights" and len(conversions) == 2
    assert converted(file) == folder and len(conversions) == 2


def test_a_cache_that_cannot_be_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("SPECONTEXT_CACHE", str(tmp_path / "taken"))
    with pytest.raises(GGUFError, match=r"cannot be written to .*taken.*SPECONTEXT_CACHE"):
        converted(file)


def test_a_full_disk(file: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def convert(path: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converting, "convert", convert)
    with pytest.raises(GGUFError, match="No space left on device; name a directory with room"):
        converted(file)


def test_a_cache_that_may_only_be_read_serves_what_it_has(file: Path, conversions: list[Path], monkeypatch: Any) -> None:
    folder = converted(file)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert converted(file) == folder


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECONTEXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/specontext")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "specontext"


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under a number that a container knows no name of: the home directory is neither in HOME nor in the list of users."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("SPECONTEXT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"specontext-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/specontext")
