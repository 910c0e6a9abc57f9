"""`specontext demo`: generated problems solved with full attention and with small budgets."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from specontext.cli.demo_document import show_document
from specontext.cli.tasks import draw_problems
from specontext.cli.terminal import UsageError, error_console, human_bytes, quiet_libraries, shorten
from specontext.config import SpeContextConfig
from specontext.errors import ConfigError
from specontext.evaluation.solve import Scored, Summary, solve, summarize
from specontext.evaluation.token_counter import token_counter
from specontext.gguf.files import PACKAGED
from specontext.tasks import TASKS, Problem

if TYPE_CHECKING:
    from specontext import LLM

FRACTIONS = (8, 16)
DEFAULT_LENGTH, DOCUMENT_LENGTH = 4096, 6600
SPARSE_METHODS = ("speculative", "streaming")
DEFAULT_TASKS = ("niah_multikey", "niah_multivalue", "variable_tracking", "program")
# A program's answer takes two thirds of its length: 1,024 tokens give some 700 generated ones.
REASONING_LENGTH = 1024
PROBLEMS = {"program": 2}
DEFAULT_PROBLEMS = 3
SHOWN_CHARACTERS = 300
FILE_WIDTH = 110


@dataclass(frozen=True)
class Cell:
    """One row of the table: a task solved with one method and budget (None is all entries)."""

    task: str
    context: int
    method: str
    budget: int | None
    summary: Summary

    def as_object(self) -> dict[str, object]:
        """What `--json` prints for it."""
        return {
            "task": self.task,
            "context": self.context,
            "method": self.method,
            "budget": self.budget,
            "problems": self.summary.problems,
            "exact_match": self.summary.exact_match,
            "correct_steps": self.summary.correct_steps,
            "completion_tokens": self.summary.completion_tokens,
            **self.summary.stats,
        }


def demo(
    model: Annotated[
        str, typer.Argument(help="Model that shows itself; it needs a retrieval head. 'smollm2' answers a question.")
    ] = "nano",
    *,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            help="Context in tokens; the task 'program' takes 1,024 at most.",
            show_default=f"{DEFAULT_LENGTH}; of a document {DOCUMENT_LENGTH}",
        ),
    ] = None,
    problems: Annotated[
        int | None, typer.Option("--problems", help="Problems of each task.", show_default="3, of program 2")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME",
            help="Task to solve; may be repeated, or several separated by commas.",
            show_default=", ".join(DEFAULT_TASKS),
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Another seed draws other problems.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the rows of the table.")] = False,
) -> None:
    """Solve generated long-context problems with full attention and at budgets of 1/8 and 1/16 of the context.

    A pretrained model, such as smollm2, answers a question about a long document instead, unless tasks are named. With a budget,
    all layers keep their KV in host memory, so that the loaded bytes are real.
    """
    began = time.perf_counter()
    if model in PACKAGED and tasks is None:
        console = Console(highlight=False, quiet=as_json, width=None if sys.stdout.isatty() else FILE_WIDTH)
        return show_document(model, length=length or DOCUMENT_LENGTH, as_json=as_json, console=console)
    length = length or DEFAULT_LENGTH
    names = [name for listed in tasks or DEFAULT_TASKS for name in listed.split(",")]
    _check_budgets(names, length)
    drawn = {name: _draw(name, length, problems, seed, model) for name in names}
    quiet_libraries()
    console = Console(highlight=False, quiet=as_json, width=None if sys.stdout.isatty() else FILE_WIDTH)
    bench = Bench(model, max_num_seqs=max(len(listed) for listed in drawn.values()))
    cells = []
    with _progress(sum(len(list(settings(_context(name, length)))) for name in drawn)) as progress:
        job = progress.add_task("")
        for name, task_problems in drawn.items():
            _print_problem(console, task_problems[0])
            for method, budget in settings(_context(name, length)):
                progress.update(job, description=f"{name}, {method} {budget or ''}")
                scored = solve(bench.llm(method, budget), task_problems)
                cells.append(Cell(name, _context(name, length), method, budget, summarize(scored)))
                _print_output(console, method, budget, scored[0])
                progress.advance(job)
            console.print()
    elapsed = time.perf_counter() - began
    if as_json:
        print(json.dumps({"model": model, "seed": seed, "rows": [cell.as_object() for cell in cells], "elapsed_s": elapsed}))
        return
    console.print(table(cells))
    console.print(f"{elapsed:.0f} s in all", style="dim")


class Bench:
    """One engine for each method and budget, made when it is first needed."""

    def __init__(self, model: str, *, max_num_seqs: int) -> None:
        self.model, self.max_num_seqs = model, max_num_seqs
        self._engines: dict[tuple[str, int | None], LLM] = {}

    def llm(self, method: str, budget: int | None) -> LLM:
        """The engine for this method; the sparse ones keep all KV in host memory."""
        from specontext import LLM

        if (method, budget) not in self._engines:
            config = SpeContextConfig(method=method, budget=budget, offload_layers=0 if method == "full" else -1)
            self._engines[method, budget] = LLM(self.model, config=config, max_num_seqs=self.max_num_seqs)
        return self._engines[method, budget]


def settings(context: int) -> Iterator[tuple[str, int | None]]:
    """The methods and budgets that a context is solved with."""
    yield "full", None
    for method in SPARSE_METHODS:
        for fraction in FRACTIONS:
            yield method, context // fraction


def table(cells: list[Cell]) -> Table:
    """The closing table."""
    made = Table(title="Means over problems and decode steps", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    made.add_column("task")
    for column in ("context", "method", "budget", "exact match", "right steps", "tokens read", "bytes loaded", "overlap"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for i, cell in enumerate(cells):
        summary, stats = cell.summary, cell.summary.stats
        made.add_row(
            cell.task,
            f"{cell.context:,}",
            cell.method,
            _shown(cell.budget, "{:,}", "all"),
            f"{summary.exact_match:.0%}",
            _shown(summary.correct_steps, "{:.1%}"),
            _shown(stats["tokens_read_per_step"], "{:,.0f}"),
            "–" if stats["bytes_loaded_per_step"] is None else human_bytes(stats["bytes_loaded_per_step"]),
            _shown(stats["overlap"], "{:.1%}"),
            end_section=i + 1 == len(cells) or cells[i + 1].task != cell.task,
        )
    return made


def _shown(value: Any, form: str, missing: str = "–") -> str:
    return missing if value is None else form.format(value)


def _context(task: str, length: int) -> int:
    return min(length, REASONING_LENGTH) if task == "program" else length


def _check_budgets(tasks: list[str], length: int) -> None:
    """Refuse what would fail later: unknown tasks, and contexts whose smallest budget cannot hold sinks and window."""
    for task in tasks:
        if task not in TASKS:
            raise UsageError(f"unknown task '{task}': choose one of {', '.join(TASKS)}")
        try:
            SpeContextConfig(budget=max(1, _context(task, length) // max(FRACTIONS)))
        except ConfigError as error:
            raise UsageError(f"--length {length} is too short for a budget of 1/{max(FRACTIONS)} of it: {error}") from error


def _draw(task: str, length: int, n: int | None, seed: int, model: str) -> list[Problem]:
    count = PROBLEMS.get(task, DEFAULT_PROBLEMS) if n is None else n
    return draw_problems(task, length=_context(task, length), seed=seed, n=count, count_tokens=token_counter(model))


def _progress(total: int) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=error_console(),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _print_problem(console: Console, problem: Problem) -> None:
    console.print(f"[bold]{problem.task}[/bold], {problem.length:,} tokens with the answer")
    console.print(escape(shorten(problem.prompt, SHOWN_CHARACTERS)), style="dim")
    console.print(f"  {'expected':<16} {escape(_one_line(problem.answer))}")


def _print_output(console: Console, method: str, budget: int | None, scored: Scored) -> None:
    mark, colour = ("✓", "green") if scored.correct else ("✗", "red")
    label = method if budget is None else f"{method} {budget}"
    console.print(f"[{colour}]{mark}[/{colour}] {label:<16} {escape(_one_line(scored.output))}")


def _one_line(text: str) -> str:
    return shorten(" ".join(text.split()), 80)
