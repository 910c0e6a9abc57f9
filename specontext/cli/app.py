"""The command line's verbs, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from specontext import __version__
from specontext.cli.bench import bench_app
from specontext.cli.chat import chat
from specontext.cli.demo import demo
from specontext.cli.deploy import deploy
from specontext.cli.distill import distill
from specontext.cli.eval import evaluate
from specontext.cli.generate import generate
from specontext.cli.head import head_app
from specontext.cli.plan import plan
from specontext.cli.report import report
from specontext.cli.serve import serve
from specontext.cli.tasks import tasks_app

app = typer.Typer(
    name="specontext",
    help="Long-context LLM inference that reads a small part of its KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command()(generate)
app.command()(serve)
app.command("deploy")(deploy)
app.command()(chat)
app.command()(demo)
app.command()(distill)
app.command("eval")(evaluate)
app.command()(plan)
app.command()(report)
app.add_typer(tasks_app, name="tasks")
app.add_typer(head_app, name="head")
app.add_typer(bench_app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"specontext {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Long-context LLM inference that reads a small part of its KV cache."""
