"""`specontext eval`: methods side by side on a suite of problems, through the same engine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from specontext.cli.analyze import whole_numbers
from specontext.cli.options import BATCH_OPTIONS, ENGINE_OPTIONS, Settings, refuse_unused, with_settings
from specontext.cli.terminal import MODEL_HELP, UsageError, error_console, human_bytes, named_path, quiet_libraries
from specontext.retrieval.registry import CHOICES

if TYPE_CHECKING:
    from specontext.evaluation.run import Advance, Begin

FILE_WIDTH = 120
CONTINUATION_COLUMNS = (
    *("budget", "method", "rows read", "n", "parts after", "alike", "repeated 4-grams", "log-probability", "minus full's "),
    "tokens written",
)
# The seed is of problems, and one loaded model serves several engines, which ranks cannot share.
EVAL_ENGINE_OPTIONS = (*(name for name in ENGINE_OPTIONS if name not in ("seed", "tensor_parallel_size")), *BATCH_OPTIONS)


@with_settings(method=("sink", "recent"), engine=EVAL_ENGINE_OPTIONS)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    *,
    suite: Annotated[str, typer.Option("--suite", metavar="A,B,...", help="Suites of problems.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="DIR", parser=named_path, help="Directory of the results; a stopped run goes on there."
        ),
    ],
    methods: Annotated[
        str,
        typer.Option("--methods", metavar="A,B,...", help=f"Among {', '.join(CHOICES)}. speculative@DIR has a head of its own."),
    ] = "full,speculative",
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets",
            metavar="A,B,...",
            help="KV entries that are read, sinks and recent ones included, or shares of the length such as 1/8. "
            "Default: what the retrieval head recommends.",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths", metavar="A,B,...", help="Tokens of prompt and answer together. Default: the tasks' own lengths."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Problems of each task and length at most.")] = 20,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B,...", help="Tasks of the suites. Default: all that fit the model.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH|NAME", help="Data of a suite that needs some: a path or a Hub name.")
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILE|tasks|...",
            help="Text of the suites fidelity, continuation and documents: a file, a directory, hf:NAME, tasks; repeatable.",
        ),
    ] = None,
    compared: Annotated[
        int, typer.Option("--compare", help="Last tokens of a text, half of it at most, that fidelity compares at.")
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Tokens that continuation writes at most; half of a length is the prompt.")
    ] = 2048,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge", metavar="URL", help="OpenAI-compatible endpoint that judges what longwriter wrote; key in OPENAI_API_KEY."
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="Model of the judge.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of problems and resamples.")] = 0,
    retrieval_head: Annotated[
        str, typer.Option("--retrieval-head", metavar="DIR|auto|none", help="Retrieval head; 'auto' takes the checkpoint's own.")
    ] = "auto",
    offload_layers: Annotated[
        int, typer.Option("--offload-layers", help="Layers whose KV lives in host memory, the last ones first; -1 offloads all.")
    ] = 0,
    skip_unsupported: Annotated[
        bool, typer.Option("--skip-unsupported", help="Leave methods out that cannot work on the model, instead of an error.")
    ] = False,
    settings: Settings,
) -> None:
    """Let methods answer the same problems greedily and compare their scores and what they read.

    Writes results.json, report.html and report.md to DIR, and every answer to DIR/samples.jsonl.
    """
    quiet_libraries()
    from specontext.evaluation.budgets import parse_budgets
    from specontext.evaluation.continuation.rows import SUITE as CONTINUATION
    from specontext.evaluation.engines import GPU_OPTIONS
    from specontext.evaluation.fidelity.rows import SUITE as FIDELITY
    from specontext.evaluation.report import write_report
    from specontext.evaluation.settings import EvaluationSettings
    from specontext.evaluation.start import evaluate as run
    from specontext.evaluation.suites.longwriter_judge import Judge

    if (judge is None) != (judge_model is None):
        raise UsageError("--judge and --judge-model belong together: give both, or neither")
    asked_suites = words(suite)
    refuse_unused(
        context,
        {
            **({} if CONTINUATION in asked_suites else {"new_tokens": f"without the suite {CONTINUATION}"}),
            **({} if FIDELITY in asked_suites else {"compared": f"without the suite {FIDELITY}"}),
        },
    )
    sources = {name: context.get_parameter_source(name) for name in GPU_OPTIONS}
    unsaid = [name for name, source in sources.items() if source is not None and source.name == "DEFAULT"]
    asked = EvaluationSettings(
        model=model,
        suites=asked_suites,
        out=out,
        methods=words(methods),
        budgets=None if budgets is None else parse_budgets(budgets),
        lengths=None if lengths is None else whole_numbers("--lengths", lengths),
        limit=limit,
        tasks=None if tasks is None else words(tasks),
        data=data,
        texts=tuple(texts or ()),
        compared=compared,
        new_tokens=new_tokens,
        judge=None if judge is None or judge_model is None else Judge.at(judge, judge_model),
        seed=seed,
        retrieval_head=None if retrieval_head == "none" else retrieval_head,
        sink=settings.config.sink,
        recent=settings.config.recent,
        offload_layers=offload_layers,
        engine={name: value for name, value in settings.engine.items() if name not in unsaid},
        skip_unsupported=skip_unsupported,
        command=command_line(context),
    )
    with progress_bars() as begin:
        results = run(asked, begin)
    print_notes(results["meta"]["notes"])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    for table in tables(results):
        console.print(table)
    for file in (out / "results.json", *write_report(out)):
        print(file)


def words(text: str) -> tuple[str, ...]:
    """Names with commas, each once."""
    return tuple(dict.fromkeys(word for part in text.split(",") if (word := part.strip())))


def command_line(context: typer.Context) -> str:
    """The command with the options that were given."""
    said = ["specontext", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.param_type_name == "argument":
            said.append(str(value))
        elif (source := context.get_parameter_source(str(parameter.name))) is not None and source.name == "COMMANDLINE":
            if isinstance(value, bool):
                said.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            else:
                for each in value if isinstance(value, list | tuple) else [value]:
                    said += [parameter.opts[0], str(each)]
    return shlex.join(said)


def print_notes(notes: Sequence[dict[str, Any]]) -> None:
    """Say on stderr what was left out and why, once for each reason."""
    from specontext.evaluation.report.places import places_by_reason

    for why, places in places_by_reason(notes).items():
        error_console().print(escape(f"{'; '.join(places)}: {why}"), style="dim")


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """A table for each task, and one of the means over a suite's tasks: scores, differences to full attention, what was read."""
    from specontext.cli.fidelity_table import fidelity_tables
    from specontext.cli.part_table import part_table
    from specontext.evaluation.continuation.rows import SUITE as CONTINUATION
    from specontext.evaluation.fidelity.rows import SUITE as FIDELITY
    from specontext.evaluation.report.averages import mean_over_tasks, mean_pairs
    from specontext.evaluation.report.continuation import continuation_tables
    from specontext.evaluation.report.results import read_results

    for suite in dict.fromkeys(row["suite"] for row in results["rows"]):
        if suite == CONTINUATION:
            read = read_results(results)
            yield from (part_table(table, CONTINUATION_COLUMNS) for table in continuation_tables(read.of(suite), read))
            continue
        if suite == FIDELITY:
            yield from fidelity_tables(*([one for one in results[name] if one["suite"] == suite] for name in ("rows", "pairs")))
            continue
        rows, pairs = ([one for one in results[name] if one["suite"] == suite] for name in ("rows", "pairs"))
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        for task in tasks:
            yield _table(f"{suite}: {task}", *([one for one in some if one["task"] == task] for some in (rows, pairs)))
        if len(tasks) > 1:
            yield _table(f"{suite}: mean over tasks", mean_over_tasks(rows)[0], mean_pairs(pairs))


def _table(title: str, rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> Table:
    to_full = {(p["method"], p["budget"], p["length"]): p for p in pairs if p["other"] == "full"}
    made = Table(title=escape(title), box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title_justify="left")
    for column in ("length", "method", "budget", "n", "score", "95 %", "minus full", "95 %", "read", "overlap", "loaded", "s"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        pair = to_full.get((row["method"], row["budget"], row["length"]))
        made.add_row(
            _number(row["length"]),
            escape(row["method"]),
            _number(row["budget"]),
            _number(row["n"]),
            _percent(row["score"]),
            _interval(row),
            _percent(pair["difference"]) if pair else "–",
            _interval(pair) if pair else "–",
            _number(row["tokens_read"]),
            _percent(row["overlap"]),
            "–" if row["bytes_loaded"] is None else human_bytes(row["bytes_loaded"]),
            f"{row['seconds']:.2f}",
        )
    return made


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(row: dict[str, Any]) -> str:
    return "–" if row["ci_low"] is None else f"{100 * row['ci_low']:.1f} .. {100 * row['ci_high']:.1f}"


@contextmanager
def progress_bars() -> Iterator[Begin]:
    """A bar for each phase on a terminal, nothing elsewhere."""
    console = error_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bars:

        def begin(phase: str, parts: int) -> Advance:
            job = bars.add_task(phase, total=parts)
            return lambda done: bars.advance(job, done)

        yield begin
