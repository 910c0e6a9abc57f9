"""`specontext head analyze`: measure what a retrieval head selects against the target's true attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from specontext.cli.options import OWN_CODE, Settings, with_settings
from specontext.cli.terminal import UsageError, error_console, named_path, quiet_libraries

if TYPE_CHECKING:
    from specontext.evaluation.analysis.report import Begin

FILE_WIDTH = 110


@with_settings(method=(), engine=OWN_CODE)
def analyze(
    head: Annotated[str, typer.Argument(help="A head directory, an EAGLE-3 draft, or 'nano'.", show_default=False)],
    *,
    target: Annotated[str, typer.Option("--target", metavar="MODEL", help="The model the head selects for.")],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="SPEC",
            help="Text file, directory, .jsonl, .parquet, hf:NAME, tasks or tasks:KIND; held-out parts are measured; repeatable.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", parser=named_path, help="Directory for analysis.json and the plots.")
    ],
    compare: Annotated[
        list[str] | None, typer.Option("--compare", metavar="DIR", help="A further head, such as an embedding-only one.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens of the sequences. Default: 4096, or what model and texts hold.")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", metavar="A,B,...", help="KV entries, sinks and recent ones included. Default: 32 .. 2048."),
    ] = None,
    queries: Annotated[int, typer.Option("--queries", help="Query positions of each sequence.")] = 64,
    sequences: Annotated[int, typer.Option("--sequences", help="Sequences to measure on.")] = 8,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="A,B,...|none",
            help="Context lengths of the length curve. Default: 512, 1024, ..., and 1 and 2 times the head's trained length.",
        ),
    ] = None,
    calibration_sequences: Annotated[
        int, typer.Option("--calibration-sequences", help="Other sequences, for the calibrated head map; 0 leaves it out.")
    ] = 4,
    drift_tokens: Annotated[
        int, typer.Option("--drift-tokens", help="Tokens to generate for the drift of features; 0 leaves it out.")
    ] = 384,
    sink: Annotated[int, typer.Option("--sink", help="First tokens that are always read.")] = 4,
    recent: Annotated[int, typer.Option("--recent", help="Last tokens that are always read.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sequences, query positions and random selections.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="Number format of the target's weights.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    settings: Settings,
) -> None:
    """Measure a head's selections: attention recall, hit rate, what the model's output loses, overlap of steps, reach in length,
    drift of features.

    They are compared with other granularities and head maps, with oracles on the true attention, with sinks and window and with
    random selections, all at equal budgets. Numbers go to DIR/analysis.json, plots beside it.
    """
    quiet_libraries()
    from specontext.evaluation.analysis.files import check_folder, write_analysis
    from specontext.evaluation.analysis.plots import check_matplotlib
    from specontext.evaluation.analysis.report import Analysis
    from specontext.evaluation.analysis.settings import Settings as Asked

    asked = Asked(
        head=head,
        target=target,
        texts=tuple(text),
        compare=tuple(compare or ()),
        length=length,
        budgets=None if budgets is None else whole_numbers("--budgets", budgets),
        queries=queries,
        sequences=sequences,
        lengths=() if lengths == "none" else None if lengths is None else whole_numbers("--lengths", lengths),
        calibration_sequences=calibration_sequences,
        drift_tokens=drift_tokens,
        sink=sink,
        recent=recent,
        seed=seed,
        device=device,
        dtype=dtype,
        **settings.engine,
    )
    check_matplotlib()
    check_folder(out)
    with _progress() as begin:
        report = Analysis(asked, begin).run()
    files = write_analysis(report, out)
    print_notes(report)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(table(report))
    for line in target_lines(report["targets"]):
        console.print(line)
    for file in files:
        print(file)


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers with commas.

    Raises:
        UsageError: something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers with commas, such as 256,512; got '{text}'") from error


def table(report: dict[str, Any]) -> Table:
    """Recall, hit rate, overlap and losses of everything at the budget that is nearest to 1/8 of the length."""
    from specontext.evaluation.analysis.rows import LOSSES, find, value_of

    rows, budget, length = report["rows"], report["table_budget"], report["length"]
    title = f"Budget {budget:,} of {length:,} tokens; means over layers, heads and queries"
    made = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("selection", "level", "map"):
        made.add_column(column)
    for column in ("attention recall", "hit rate", "overlap", "KL divergence", "perplexity ratio", "agreement"):
        made.add_column(column, justify="right")
    for one in find(rows, what="recall", budget=budget, length=length, layer=None):
        same = {name: one[name] for name in ("method", "granularity", "variant", "budget", "length")}
        hits = value_of(rows, what="hit_rate", map=one["map"], **same)
        again = value_of(rows, what="overlap", **same)
        name = one["variant"] or one["method"].replace("_", " ")
        lost = [value_of(rows, what=what, map=one["map"], **same) for what in LOSSES]
        cells = [f"{one['value']:.3f}", *("–" if value is None else f"{value:.3f}" for value in (hits, again, *lost))]
        made.add_row(escape(name), one["granularity"] or "–", one["map"] or "–", *cells)
    return made


def target_lines(targets: dict[str, float | None]) -> list[str]:
    """The ratios of `recall_targets` that were measured, in words."""
    words = {
        "of_shared_oracle": "recall over the shared oracle's",
        "of_oracle": "recall over that of each layer's own oracle",
        "beyond_trained": "recall at twice the trained length over that at the trained length, at 1/8",
    }
    return [f"{words[name]}: {value:.3f}" for name, value in targets.items() if value is not None]


def print_notes(report: dict[str, Any]) -> None:
    """Say on stderr what is missing from the report and why."""
    console = error_console()
    if left_out := report["budgets_left_out"]:
        everything = f"budgets of {', '.join(map(str, left_out))} left out: they hold all of {report['length']:,} tokens"
        console.print(everything, style="dim")
    for length, why in report["lengths"]["left_out"].items():
        console.print(escape(f"length {length:,} left out: {why}"), style="dim")
    if why := report["drift"].get("left_out"):
        console.print(escape(f"drift of features left out: {why}"), style="dim")
    for place in (report["measured"], *report["lengths"]["measured"].values()):
        if place["sequences"] < place["asked_sequences"]:
            found, asked = place["sequences"], place["asked_sequences"]
            console.print(escape(f"the texts gave {found} long enough sequences instead of {asked}"), style="dim")


@contextmanager
def _progress() -> Iterator[Begin]:
    """A bar for each phase on a terminal, else a line for each."""
    console = error_console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bars:

        def begin(phase: str, parts: int) -> Callable[[], None]:
            if not sys.stderr.isatty():
                console.print(phase, style="dim")
            job = bars.add_task(phase, total=parts)
            return lambda: bars.advance(job)

        yield begin
