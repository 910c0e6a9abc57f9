"""Make the GPU figures of the documentation again: a list of commands, on all cards of a machine, within a time that is given.

    python benchmarks/gpu_figures.py OUT [--seconds 540] [--only ttft,decode-*] [--list benchmarks/gpu_figures.toml]

The list names each command with the cards it needs and the seconds it takes; it is worked off in its order, as many at once as
there are cards. What would not end in time is not begun; what takes too long is ended. The raw output goes to OUT/NAME.txt, below
the machine, the day, versions and the command, as documents quote it; a command that failed leaves NAME.failed.txt. Called again
with the same OUT, it goes on with what is missing. Prints a line for each, and OUT/table.md has them in a table.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
PROGRAMS = {"python": [], "pytest": ["-m", "pytest"], "specontext": ["-m", "specontext.cli"]}


@dataclass(frozen=True)
class Figure:
    """One command: the cards it needs, and the seconds that it took or may take."""

    name: str
    command: str
    seconds: float
    cards: int = 1

    @property
    def words(self) -> list[str]:
        program, *rest = shlex.split(self.command)
        return [sys.executable, *PROGRAMS[program], *rest]


@dataclass
class Run:
    """A figure that is being made."""

    figure: Figure
    cards: list[str]
    process: subprocess.Popen[bytes]
    file: IO[bytes]
    began: float
    until: float

    def stop(self) -> None:
        """End it and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def read(path: Path, out: Path) -> list[Figure]:
    """The figures of a list. An entry with `each` stands for one figure a word, which replaces EACH; OUT is the results' path."""
    figures = []
    for entry in tomllib.loads(path.read_text())["figure"]:
        for word in entry.pop("each", [""]):
            name = entry["name"].replace("EACH", word.replace("/", "-"))
            command = entry["command"].replace("EACH", word).replace("OUT", str(out))
            figures.append(Figure(**{**entry, "name": name, "command": command}))
    for figure in figures:
        if shlex.split(figure.command)[0] not in PROGRAMS:
            raise ValueError(f"{figure.name}: a command begins with one of {', '.join(PROGRAMS)}")
    return figures


def cards_here() -> list[str]:
    """The numbers of the machine's GPUs, without starting CUDA in this process."""
    found = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else found.stdout.split()


def machine() -> str:
    """What a raw output has to say of where it was made."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "triton"))
    try:
        names = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        cards = names.stdout.strip().splitlines()
        card = cards[0] + (f" (one of {len(cards)} in the machine, others at work)" if len(cards) > 1 else "")
    except (OSError, subprocess.CalledProcessError):
        card = f"{platform.machine()}, no GPU"
    return f"{card}, {datetime.date.today()}, Python {platform.python_version()}, {versions}"


class Figures:
    """Works off a list on the cards of one machine."""

    def __init__(self, figures: Sequence[Figure], out: Path, cards: Sequence[str], seconds: float) -> None:
        self._out, self._free, self._until = out, list(cards), time.monotonic() + seconds
        self._waiting = [figure for figure in figures if not (out / f"{figure.name}.txt").exists()]
        self._running: list[Run] = []
        self._number = len(cards)
        self._header = machine()
        self.rows: list[tuple[str, float, str]] = []

    def work(self) -> None:
        """Make what there is time for; returns when nothing runs any more."""
        try:
            while self._waiting or self._running:
                self._begin()
                self._look()
                time.sleep(0.05)
        finally:
            for run in self._running:
                run.stop()

    def _begin(self) -> None:
        for figure in list(self._waiting):
            if figure.cards > self._number:
                self._left_out(figure, f"wants {figure.cards} cards")
            elif time.monotonic() + figure.seconds > self._until:
                self._left_out(figure, "no time left")
            elif figure.cards <= len(self._free):
                self._waiting.remove(figure)
                self._running.append(self._started(figure))
            else:
                return  # those behind it would keep its cards from it

    def _left_out(self, figure: Figure, why: str) -> None:
        self._waiting.remove(figure)
        self._ended(figure, 0.0, why)

    def _started(self, figure: Figure) -> Run:
        cards, self._free = self._free[: figure.cards], self._free[figure.cards :]
        file = (self._out / f"{figure.name}.failed.txt").open("wb")
        file.write(f"# {self._header}\n# {figure.command}\n".encode())
        file.flush()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(cards), "COLUMNS": "160"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            figure.words,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        now = time.monotonic()
        return Run(figure, cards, process, file, now, min(self._until, now + 2 * figure.seconds))

    def _look(self) -> None:
        for run in list(self._running):
            code, late = run.process.poll(), time.monotonic() > run.until
            if code is None and not late:
                continue
            run.stop()
            run.file.close()
            self._running.remove(run)
            self._free += run.cards
            left = self._out / f"{run.figure.name}.failed.txt"
            if code == 0:
                left.rename(self._out / f"{run.figure.name}.txt")
            self._ended(
                run.figure,
                time.monotonic() - run.began,
                "ok" if code == 0 else "took too long" if code is None else f"exit {code}",
            )

    def _ended(self, figure: Figure, seconds: float, outcome: str) -> None:
        self.rows.append((figure.name, seconds, outcome))
        print(f"{figure.name}: {outcome}, {seconds:.0f} s", flush=True)
        table = [
            "| figure | seconds | outcome |",
            "|---|---|---|",
            *(f"| {name} | {took:.0f} | {what} |" for name, took, what in self.rows),
        ]
        (self._out / "table.md").write_text("\n".join(table) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--only", default="*", help="names, or patterns of names, with commas")
    parser.add_argument("--list", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--cards", help="numbers of GPUs, with commas; default: all")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    patterns = asked.only.split(",")
    chosen = [
        figure
        for figure in read(asked.list, asked.out.resolve())
        if any(fnmatch.fnmatchcase(figure.name, pattern) for pattern in patterns)
    ]
    figures = Figures(chosen, asked.out, asked.cards.split(",") if asked.cards else cards_here(), asked.seconds)
    figures.work()
    return 0 if all(outcome == "ok" for _, _, outcome in figures.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
