"""`specontext bench paper`: the paper's tables of tokens a second."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specontext.cli.options import parse_size
from specontext.cli.terminal import UsageError, named_path, quiet_libraries

if TYPE_CHECKING:
    import torch

    from specontext.evaluation.paper.parts import Part

TABLE_NAMES = ("cloud", "single", "edge", "ablation", "concurrency")
SCALE_NAMES = ("full", "tiny")
OVERLAP = 0.85


def bench_paper(
    table: Annotated[str, typer.Option("--table", help=f"Which table: {', '.join(TABLE_NAMES)}.")],
    device: Annotated[str, typer.Option("--device", help="Where it runs: auto, cpu, cuda or cuda:N.")] = "auto",
    scale: Annotated[
        str, typer.Option("--scale", help="'full', or 'tiny': lengths by 64 and tiny models, to see that all of it works.")
    ] = "full",
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this of the table's models; may be repeated.")] = None,
    parts: Annotated[
        str | None, typer.Option("--parts", help="Only these parts, with commas between them; the begin of a name is enough.")
    ] = None,
    list_parts: Annotated[
        bool,
        typer.Option("--list-parts", help="Print a command for each part, with its minutes on a GPU, and end."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            parser=named_path,
            help="Keep the results of parts there, and run only those that are missing.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Begin no part that would end later than this; the same command goes on another time."),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="SIZE", help="What may be taken of the GPU. Default: 0.9 of it."),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option("--host-memory", metavar="SIZE", help="Host memory for KV. Default: 0.6 of what is free.")
    ] = None,
    overlap: Annotated[
        float, typer.Option("--overlap", help="Share of the selected entries that the step before selected too.")
    ] = OVERLAP,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="F.png", parser=named_path, help="Draw tokens/s of all systems.")
    ] = None,
) -> None:
    """Measure the paper's tables: Hugging Face in four ways, our full attention, other methods, and ours.

    Whole runs count, prefill included. Weights are random, in the exact shapes of the models.
    """
    _check(table, scale, overlap, plot)
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes must be above 0, got {minutes:g}")
    quiet_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|specontext)")
    from specontext.evaluation.paper.columns import SCALES, TABLES
    from specontext.evaluation.paper.results import chosen_parts, report_of, run_parts

    plan, size = TABLES[table], SCALES[scale]
    if gpu_memory is not None:
        plan = replace(plan, memory=parse_size(gpu_memory))
    names = [name.strip() for name in parts.split(",") if name.strip()] if parts else []
    chosen = chosen_parts(plan, size, model or (), names)
    if list_parts:
        if minutes is not None or plot is not None:
            raise UsageError("--list-parts measures nothing: leave out --minutes and --plot")
        given = {"gpu-memory": gpu_memory, "host-memory": host_memory, "overlap": None if overlap == OVERLAP else overlap}
        words = ["--table", table, "--device", device, "--scale", scale, "--out", str(out or "paper-results")]
        words += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        _list(words, chosen, as_json)
        return
    if minutes is not None and out is None:
        raise UsageError("--minutes leaves parts for another time, so their results have to be kept: give --out DIR")
    chip = _device(device)
    if gpu_memory is not None and chip.type != "cuda":
        raise UsageError("--gpu-memory is of a GPU, and this is a CPU: leave it")
    results, left = run_parts(
        plan,
        size,
        chosen,
        chip,
        folder=out,
        host_memory=None if host_memory is None else parse_size(host_memory),
        overlap=overlap,
        minutes=minutes,
    )
    report = report_of(plan, results) | {"left": [part.name for part in left]}
    if plot is not None:
        from specontext.cli.paper_report import draw

        draw(report, plot)
    if as_json:
        print(json.dumps(report), flush=True)
        return
    from specontext.cli.paper_report import print_report

    print_report(report)
    if plot is not None:
        print(plot)


def _check(table: str, scale: str, overlap: float, plot: Path | None) -> None:
    if table not in TABLE_NAMES:
        raise UsageError(f"unknown table '{table}': choose one of {', '.join(TABLE_NAMES)}")
    if scale not in SCALE_NAMES:
        raise UsageError(f"unknown scale '{scale}': choose one of {', '.join(SCALE_NAMES)}")
    if not 0 <= overlap <= 1:
        raise UsageError(f"--overlap must be a share from 0 to 1, got {overlap:g}")
    if plot is not None:
        from specontext.cli.plan_plot import check_plot

        check_plot(plot)


def _device(name: str) -> torch.device:
    from specontext.engine.start import pick_device

    return pick_device(name)


def _list(words: list[str], parts: list[Part], as_json: bool) -> None:
    """The commands, one a part, so that each can be run when there is a GPU for it."""
    command = shlex.join(["specontext", "bench", "paper", *words])
    commands: list[dict[str, Any]] = [
        {"part": part.name, "minutes": part.minutes, "command": f"{command} --parts {part.name}"} for part in parts
    ]
    if as_json:
        print(json.dumps(commands))
        return
    for one in commands:
        print(f"{one['command']}  # about {one['minutes']:g} minutes on a GPU")
    print(f"# together about {sum(part.minutes for part in parts):g} minutes on a GPU, estimated", file=sys.stderr)
