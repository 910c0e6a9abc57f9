"""`specontext tasks`: the generated tasks and fresh problems of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from specontext.cli.options import OWN_CODE, Settings, with_settings
from specontext.cli.terminal import UsageError, shorten
from specontext.tasks import TASKS, Problem, sample_problems
from specontext.tasks.problem import TokenCounter

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PRINTED_CHARACTERS = 600

tasks_app = typer.Typer(help="The generated tasks and fresh problems of them.", no_args_is_help=True, rich_markup_mode=None)


@tasks_app.command("list")
def list_tasks(as_json: AsJson = False) -> None:
    """Print the names of the tasks."""
    print(json.dumps(list(TASKS)) if as_json else "\n".join(TASKS))


@tasks_app.command()
@with_settings(method=(), engine=OWN_CODE)
def sample(
    task: Annotated[str, typer.Option("--task", help="Name of a task, see `specontext tasks list`.", show_default=False)],
    length: Annotated[int, typer.Option("--length", help="Tokens of prompt and answer together, at most.")] = 4096,
    seed: Annotated[int, typer.Option("--seed", help="The same seed draws the same problems.")] = 0,
    n: Annotated[int, typer.Option("--n", help="Number of problems.")] = 1,
    model: Annotated[str, typer.Option("--model", help="Model whose tokenizer counts the length.")] = "nano",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of problems with prompt, answer, task and length.")
    ] = False,
    *,
    settings: Settings,
) -> None:
    """Draw fresh problems; an output is right when it contains the answer verbatim."""
    from specontext.evaluation.token_counter import token_counter

    count_tokens = token_counter(model, **settings.engine)
    problems = draw_problems(task, length=length, seed=seed, n=n, count_tokens=count_tokens)
    if as_json:
        print(json.dumps([asdict(problem) for problem in problems]))
        return
    for problem in problems:
        print(f"--- {problem.task}, {problem.length} tokens")
        print(shorten(problem.prompt, PRINTED_CHARACTERS))
        print(f"--- answer\n{shorten(problem.answer, PRINTED_CHARACTERS)}\n")


def draw_problems(name: str, *, length: int, seed: int, n: int, count_tokens: TokenCounter) -> list[Problem]:
    """As `sample_problems`, with a usage error for an unknown task or a length that cannot hold it."""
    try:
        return sample_problems(name, length=length, seed=seed, n=n, count_tokens=count_tokens)
    except ValueError as error:
        raise UsageError(str(error)) from error
