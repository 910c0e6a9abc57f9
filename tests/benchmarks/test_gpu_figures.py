"""Figures of GPUs are made by a list: what is begun, what is kept, how it goes on. Commands here are small, cards are numbers."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWS = "import os; print('cards', os.environ['CUDA_VISIBLE_DEVICES'])"
WAITS = "import subprocess; child = subprocess.Popen(['sleep', '600']); print('child', child.pid, flush=True); child.wait()"


def entry(name: str, code: str, seconds: float = 5, cards: int = 1, each: str = "") -> str:
    return f'[[figure]]\nname = "{name}"\ncommand = "python -c \\"{code}\\""\nseconds = {seconds}\ncards = {cards}\n{each}\n'


def work(out: Path, *entries: str, seconds: float = 30, cards: str = "0,1") -> tuple[int, str]:
    listed = out.parent / "list.toml"
    listed.write_text("".join(entries))
    words = [
        sys.executable,
        "benchmarks/gpu_figures.py",
        str(out),
        "--list",
        str(listed),
        "--cards",
        cards,
        "--seconds",
        str(seconds),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_was_made_is_kept_with_its_command_and_not_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    good, bad = entry("shows-EACH", SHOWS + "; print('EACH')", each='each = ["a/b", "c"]'), entry("fails", "raise SystemExit(3)")
    code, printed = work(out, good, bad, entry("both", SHOWS, cards=2), entry("more", SHOWS, cards=4))
    assert code == 1 and "fails: exit 3" in printed and "more: wants 4 cards" in printed
    first, second, *rest = (out / "shows-a-b.txt").read_text().splitlines()
    assert re.search(r"\d{4}-\d\d-\d\d, Python 3.*torch \d.*transformers \d", first) and second.startswith("# python -c")
    assert rest[0] in ("cards 0", "cards 1") and rest[1] == "a/b"
    assert sorted((out / "both.txt").read_text().split()[-1].split(",")) == ["0", "1"]
    assert (
        (out / "fails.failed.txt").exists() and not (out / "fails.txt").exists() and "| fails |" in (out / "table.md").read_text()
    )
    code, printed = work(out, good, entry("fails", "print(1)"))
    assert code == 0 and "shows" not in printed and (out / "fails.txt").exists() and not (out / "fails.failed.txt").exists()


@pytest.mark.slow
def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = work(out, entry("waits", WAITS, seconds=1), entry("late", SHOWS, seconds=100))
    assert code == 1 and "waits: took too long" in printed and "late: no time left" in printed
    child = int((out / "waits.failed.txt").read_text().splitlines()[2].removeprefix("child "))
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_list_of_figures_names_what_exists() -> None:
    listed = tomllib.loads((ROOT / "benchmarks" / "gpu_figures.toml").read_text())["figure"]
    names = [item["name"] for item in listed]
    assert len(names) == len(set(names))
    for item in listed:
        program, *words = item["command"].split()
        assert program in ("python", "pytest", "specontext") and item["seconds"] > 0
        for word in words if program != "specontext" else []:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word
