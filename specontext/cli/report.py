"""`specontext report`: write the report of an evaluation again, and record what the heads read for one prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from specontext.cli.generate import chat_prompt, load_llm, read_prompt
from specontext.cli.options import ENGINE_OPTIONS, Settings, with_settings
from specontext.cli.terminal import UsageError, named_path
from specontext.retrieval.registry import CHOICES, base_of

OPTIONS = tuple(name for name in ENGINE_OPTIONS if name != "measure_recall")  # recording measures in any case


@with_settings(method=("budget", "sink", "recent", "granularity"), engine=OPTIONS)
def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", parser=named_path, help="Directory of an evaluation.", show_default=False)
    ],
    *,
    record: Annotated[
        str | None,
        typer.Option("--record", metavar="MODEL", help="Record for one prompt what the heads of this model read, and show it."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="With --record: the prompt, taken as it is.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", metavar="FILE", help="With --record: UTF-8 file with the prompt, '-' is standard input."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="With --record: put the prompt into the model's chat template.")] = False,
    method: Annotated[
        str, typer.Option("--method", help=f"With --record: selection method, one of {', '.join(CHOICES)}.")
    ] = "speculative",
    tokens: Annotated[int, typer.Option("--tokens", help="With --record: generated tokens to record at most.")] = 32,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="With --record: go on after the model's end token.")] = False,
    retrieval_head: Annotated[
        str, typer.Option("--retrieval-head", metavar="DIR|auto|none", help="With --record: the retrieval head.")
    ] = "auto",
    settings: Settings,
) -> None:
    """Write report.html and report.md of an evaluation from DIR/results.json, and DIR/selections.json where it is there.

    --record MODEL makes DIR/selections.json first: it generates from a prompt, and for every token the report then shows what
    each KV head read beside its true attention. DIR need not hold an evaluation for that.
    """
    if record is not None:
        _record(directory, record, (prompt, prompt_file), chat, method, tokens, ignore_eos, retrieval_head, settings)
    elif settings.changed or (prompt, prompt_file, chat, ignore_eos, retrieval_head) != (None, None, False, False, "auto"):
        raise UsageError("options of a model and a prompt need --record MODEL; without it the report is only written again")
    from specontext.evaluation.report import write_report

    for file in write_report(directory):
        print(file)


def _record(
    directory: Path,
    model: str,
    prompts: tuple[str | None, str | None],
    chat: bool,
    method: str,
    tokens: int,
    ignore_eos: bool,
    retrieval_head: str,
    settings: Settings,
) -> None:
    if prompts.count(None) != 1:
        raise UsageError("--record needs one prompt: give --prompt TEXT or --prompt-file FILE")
    if method not in CHOICES:
        raise UsageError(f"unknown method '{method}': choose one of {', '.join(CHOICES)}")
    text = read_prompt(*prompts, None)
    from specontext.evaluation.selections import record_selections, write_selections

    base = base_of(method)
    config = replace(settings.config, method=base, offload_layers=0)
    engine = settings.engine | {"measure_recall": True, "max_num_seqs": 1, "methods": (base, method)}
    llm = load_llm(model, retrieval_head, replace(settings, config=config, engine=engine))
    given = chat_prompt(llm, text) if chat else text
    made = record_selections(llm, given, tokens=tokens, method=method, ignore_eos=ignore_eos)
    print(write_selections(directory, made))
