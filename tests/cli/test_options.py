"""Options are made from the fields of the settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specontext.cli.options import ENGINE_OPTIONS, UNITS, Settings, parse_size
from specontext.cli.terminal import UsageError, human_bytes, shorten
from specontext.config import EngineConfig, SpeContextConfig


def test_every_setting_of_the_method_is_an_option(run: Any) -> None:
    shown = re.sub(r"\s+", " ", run("generate", "--help").stdout)
    known = {field.name: field for field in fields(SpeContextConfig)}
    known |= {field.name: field for field in fields(EngineConfig) if field.name in ENGINE_OPTIONS}
    for name, field in known.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert field.metadata["help"].split()[0] in shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("4096MiB", 2**32), ("1.5 GB", 1_500_000_000), ("123", 123), ("2kib", 2048), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_sizes_are_exact(count: int, unit: str) -> None:
    assert parse_size(f"{count}{unit}") == count * UNITS[unit]


HUGE = ["9" * 400 + ".0TB", "9" * 5000, "9" * 25 + "TiB"]


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "12XB", "1 2", "0", "0.1B", "1,5GB", "nan", "∞", *HUGE])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size") as refused:
        parse_size(text)
    assert len(str(refused.value)) < 300


def test_secrets_are_hidden() -> None:
    assert Settings(SpeContextConfig(), {}, {"api_key": "s3cret", "budget": 64}).describe() == "api_key=***, budget=64"


@given(st.text(max_size=200), st.integers(1, 80))
def test_shortening_keeps_both_ends(text: str, width: int) -> None:
    short = shorten(text, width)
    assert (
        short == text
        if len(text) <= width
        else short.startswith(text[: width // 2]) and short.endswith(text[len(text) - width // 2 :])
    )


def test_human_bytes() -> None:
    assert [human_bytes(x) for x in (0, 512, 2048, 300 * 1024, 5 * 2**20, 3 * 2**40)] == [
        "0 B",
        "512 B",
        "2.0 KiB",
        "300 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]


def test_version(run: Any) -> None:
    from specontext import __version__

    ran = run("--version")
    assert (ran.status, ran.stdout) == (0, f"specontext {__version__}\n")


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "nano", "--suite", "ruler", "-o", ""),
        ("report", ""),
        ("head", "analyze", "nano", "--text", "tasks", "-o", ""),
        ("head", "calibrate", "nano", "--target", "nano", "--text", "tasks", "-o", ""),
        ("head", "prune", "nano", "--target", "nano", "-o", ""),
        ("distill", "nano", "--data", "tasks", "-o", ""),
        ("bench", "paper", "--out", ""),
        ("bench", "paper", "--plot", ""),
        ("plan", "nano", "--gpu-memory", "1GiB", "--plot", ""),
        ("generate", "nano", "--prompt-file", ""),
        ("generate", "nano", "--prompt", "a", "--offload-dir", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_no_current_directory_and_no_standard_input(
    words: tuple[str, ...], fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell writes a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    assert "the name of a file or directory is empty: name one, or '.'" in fails(words, stdin=b"a prompt")
    assert not list(tmp_path.iterdir())


def test_a_home_directory_is_found_behind_an_equals_sign(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where shells leave the `~` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("apple")
    ran = run("generate", "nano", "--prompt-file=~/prompt.txt", "--max-tokens", 1, "--json")
    assert ran.status == 0 and ran.json["completion_tokens"] == 1, ran.stderr
    ran = run("head", "prune", "nano", "--target", "nano", "--out=~/head")
    assert ran.status == 0 and (tmp_path / "head" / "config.json").is_file() and not (tmp_path / "~").exists()
