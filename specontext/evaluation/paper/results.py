"""Rows of a table's parts: run, kept and read again, and set against each other within a part."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from specontext import __version__
from specontext.evaluation.paper.bench import Bench, Row, open_bench
from specontext.evaluation.paper.columns import Scale, TablePlan
from specontext.evaluation.paper.loop import free
from specontext.evaluation.paper.parts import Part, parts_of
from specontext.evaluation.paper.progress import PaperError, Progress, check_folder, write_json

VERSION = 1  # of what a part's file holds
OVER = {"hf-eager, 4 requests": "over_hf_eager_4", "hf-eager": "over_hf_eager", "hf-sdpa": "over_hf_sdpa", "full": "over_full"}
OVER |= {"hf-static": "over_hf_static", "hf-offloaded": "over_hf_offloaded"}


def chosen_parts(table: TablePlan, scale: Scale, models: Sequence[str], names: Sequence[str]) -> list[Part]:
    """The parts of a table, of some models or with some names; a name may be the begin of several.

    Raises:
        PaperError: none is called so.
    """
    found = [part for part in parts_of(table, scale) if not models or part.model in models]
    for model in models:
        if model not in table.models:
            raise PaperError(f"table {table.name} has no model '{model}': choose among {', '.join(table.models)}")
    for name in names:
        if not any(part.name.startswith(name) for part in found):
            raise PaperError(f"table {table.name} has no part '{name}': --list-parts names them")
    return [part for part in found if not names or any(part.name.startswith(name) for name in names)]


def run_parts(
    table: TablePlan,
    scale: Scale,
    parts: Sequence[Part],
    device: torch.device,
    *,
    folder: Path | None,
    host_memory: int | None,
    overlap: float,
    minutes: float | None = None,
) -> tuple[list[dict[str, Any]], list[Part]]:
    """Results of parts: those that the folder has already, on such a device and with such settings, are not run again.

    Args:
        minutes: no part is begun that is not expected to end by then; the first that is missing is begun in any case.

    Returns:
        The results, and the parts that there was no time for.

    Raises:
        PaperError: the folder cannot be written.
    """
    about = {
        "version": VERSION,
        "table": table.name,
        "scale": scale.name,
        "device": device_name(device),
        "overlap": overlap,
        "gpu_memory": table.memory,
        "specontext": __version__,
        "torch": torch.__version__,
    }
    if folder is not None:
        check_folder(folder)
    bench: Bench | None = None
    found, left = [], []
    kept = {part.name: None if folder is None else read_part(folder / part.file_name, about) for part in parts}
    progress, began, clock = Progress(folder, about, _say), time.perf_counter(), _Minutes(parts, kept)
    with capped(table.memory, device):
        for part in parts:
            result = kept[part.name]
            if result is not None:
                _say(f"kept: {part.name}")
            elif minutes is not None and clock.measured and clock.of(part) > minutes - (time.perf_counter() - began) / 60:
                left.append(part)
                continue
            else:
                there = progress.begin(part.file_name)
                takes = [] if scale.tiny else [f"about {clock.of(part):.1f} minutes on a GPU"]
                takes += [f"{there} numbers are there" if there > 1 else "1 number is there"] if there else []
                _say(f"measuring {part.name}" + (f" ({', '.join(takes)})" if takes else ""))
                start = time.perf_counter()
                if bench is None or bench.loaded.name != part.model:
                    bench = None
                    free(device)
                    bench = open_bench(part.model, scale, device, memory=table.memory, host_memory=host_memory, overlap=overlap)
                    bench = replace(bench, progress=progress)
                rows = with_ratios(part.rows(bench))
                seconds = time.perf_counter() - start
                failed = any(row.get("failed") for row in rows)
                clock.took(part, seconds, whole=not there and not failed)
                result = about | {"part": part.name, "date": date.today().isoformat(), "seconds": seconds, "rows": rows}
                if there:
                    result["resumed"] = there
                if folder is not None and not failed:
                    write_json(folder / part.file_name, result | {"searched": progress.own})
                    progress.end()
            found.append(result)
    if left:
        count = "1 part" if len(left) == 1 else f"{len(left)} parts"
        rest = "" if scale.tiny else f", about {sum(map(clock.of, left)):.0f} minutes on a GPU"
        _say(f"left for another time: {count}{rest}; the same command goes on")
    return found, left


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


class _Minutes:
    """How long parts take: as was estimated, and as others of this machine have taken that were measured as a whole."""

    def __init__(self, parts: Sequence[Part], kept: Mapping[str, dict[str, Any] | None]) -> None:
        self.measured = False  # something, by this process
        self._taken = self._estimated = 0.0
        for part in parts:
            if (result := kept[part.name]) is not None and "seconds" in result and "resumed" not in result:
                self._count(part, result["seconds"])

    def of(self, part: Part) -> float:
        return part.minutes * (self._taken / self._estimated if self._estimated else 1.0)

    def took(self, part: Part, seconds: float, *, whole: bool) -> None:
        self.measured = True
        if whole:
            self._count(part, seconds)

    def _count(self, part: Part, seconds: float) -> None:
        self._taken += seconds / 60
        self._estimated += part.minutes


def device_name(device: torch.device) -> str:
    """A card by its name; a CPU by its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def capped(memory: int | None, device: torch.device) -> Iterator[None]:
    """All that PyTorch allocates on the GPU is within so many bytes, Hugging Face's systems and ours alike."""
    if memory is None or device.type != "cuda":
        yield
        return
    card = torch.cuda.current_device() if device.index is None else device.index  # PyTorch wants a number here
    total = torch.cuda.get_device_properties(card).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), card)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)


def read_part(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What was kept of a part; None where there is nothing, or it was measured with other settings."""
    try:
        found = json.loads(file.read_text())
        return found if all(found.get(name) == value for name, value in about.items()) and found["rows"] else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def with_ratios(rows: list[Row]) -> list[Row]:
    """Rows with how many times as fast they are as the systems of the same part that everything is compared with."""
    for row in rows:
        for system, name in OVER.items():
            rates = [one["tokens_per_s"] for one in rows if one["system"] == system and _beside(one, row) and one["tokens_per_s"]]
            row[name] = row["tokens_per_s"] / rates[0] if rates and row["tokens_per_s"] else None
    return rows


def _beside(one: Row, other: Row) -> bool:
    """Whether two rows are of the same work: a column's steps at one length are not those of the whole of it."""
    return all(one.get(name) == other.get(name) for name in ("model", "column", "prompt", "output", "concurrency"))


def link(rows: list[Row]) -> list[Row]:
    """Rows with ratios to systems that another part measured: both were set against our full attention on the same card, or,
    where a part has no such row, against Hugging Face's SDPA, whose steps wait for the host and differ more between machines."""
    for row in rows:
        for system, name in OVER.items():
            for way in ("over_full", "over_hf_sdpa"):
                others = [one[way] for one in rows if one["system"] == system and _beside(one, row) and one[way]]
                if row[name] is None and others and row[way]:
                    row |= {name: row[way] / others[0], "linked": [*row.get("linked", ()), name]}
    return rows


def report_of(table: TablePlan, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One object for all: rows with the part that they come from."""
    first = results[0] if results else {}
    rows = [{"part": result["part"], "date": result["date"]} | row for result in results for row in result["rows"]]
    rows = link(rows)
    about = {name: first.get(name) for name in ("scale", "device", "gpu_memory", "overlap", "specontext", "torch")}
    proofs = [row["sampled_over_whole"] for row in rows if "sampled_over_whole" in row]
    choices = [row["choice_over_best"] for row in rows if "choice_over_best" in row]
    return {
        "benchmark": "paper",
        "table": table.name,
        **about,
        "models": list(dict.fromkeys(row["model"] for row in rows)),
        "systems": list(dict.fromkeys(row["system"] for row in rows)),
        "columns": list(dict.fromkeys(row["column"] for row in rows)),
        "weights": "random, in the exact shapes of the models" if first.get("scale") == "full" else "random, tiny",
        "decode": "steps at some lengths of the growing context, summed by the trapezoidal rule; `sampled` says where",
        "sampled_over_whole": proofs,
        "choice_over_best": choices,
        "parts": [result["part"] for result in results],
        "rows": rows,
    }
