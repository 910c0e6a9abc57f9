"""`specontext bench`: throughput and latencies of a server, or of the offline engine; `bench_paper.py` has the paper's tables."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from specontext.cli.api_keys import KeyOfServer, key_to_send
from specontext.cli.bench_paper import bench_paper
from specontext.cli.generate import load_llm
from specontext.cli.options import BATCH_OPTIONS, ENGINE_OPTIONS, OWN_CODE, Settings, with_settings
from specontext.cli.terminal import MODEL_HELP, error_console, quiet_libraries
from specontext.evaluation.traffic.http import Address, HttpError, fetch_json
from specontext.evaluation.traffic.measure import Target, measure
from specontext.evaluation.traffic.report import TIMES, summarise
from specontext.evaluation.traffic.workload import Workload

bench_app = typer.Typer(help="Measure throughput and latencies: a table, then one line of JSON.", no_args_is_help=True)

bench_app.command("paper")(bench_paper)

NumPrompts = Annotated[int, typer.Option("--num-prompts", help="Requests to send.")]
InputLen = Annotated[int, typer.Option("--input-len", help="Tokens of each prompt; they are random.")]
OutputLen = Annotated[int, typer.Option("--output-len", help="Tokens to generate for each prompt.")]
NumWarmups = Annotated[int, typer.Option("--num-warmups", min=0, help="Further prompts that go before and are not counted.")]


@bench_app.command("serve")
@with_settings(method=(), engine=OWN_CODE)
def bench_serve(
    base_url: Annotated[str, typer.Option("--base-url", help="Address of the server.")] = "http://127.0.0.1:8000",
    api_key: KeyOfServer = None,
    model: Annotated[str | None, typer.Option("--model", help="Model to ask for. Default: the server's first.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Model whose tokens are used. Default: what the server says it serves.")
    ] = None,
    num_prompts: NumPrompts = 100,
    request_rate: Annotated[
        float, typer.Option("--request-rate", help="Requests a second, arriving at random; inf sends all at once.")
    ] = math.inf,
    max_concurrency: Annotated[
        int | None, typer.Option("--max-concurrency", help="Requests under way at a time. Default: no limit.")
    ] = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Ask for the answers in pieces.")] = True,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Go on after end tokens (servers other than ours may refuse it).")
    ] = True,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    num_warmups: NumWarmups = 1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of prompts and arrivals.")] = 0,
    *,
    settings: Settings,
) -> None:
    """Send random prompts to a running OpenAI-compatible server."""
    workload = Workload(num_prompts, input_len, output_len, request_rate, max_concurrency, seed)
    address = Address.parse(base_url, key_to_send(api_key))
    asked = (address, model, tokenizer, workload, stream, ignore_eos, temperature, num_warmups)
    result = asyncio.run(_measure_server(*asked, **settings.engine))
    own: dict[str, Any] = {
        "base_url": base_url,
        "num_prompts": num_prompts,
        "request_rate": "inf" if math.isinf(request_rate) else request_rate,
        "max_concurrency": max_concurrency,
        "input_len": input_len,
        "output_len": output_len,
        "stream": stream,
    }
    _print(own | result)


async def _measure_server(
    address: Address,
    model: str | None,
    tokenizer: str | None,
    workload: Workload,
    stream: bool,
    ignore_eos: bool,
    temperature: float,
    warmups: int,
    *,
    trust_remote_code: bool,
) -> dict[str, Any]:
    name, root, note = (model, tokenizer, None) if model and tokenizer else await _served(address, model, tokenizer)
    quiet_libraries()
    from specontext.models.tokenizer_files import load_tokenizer

    prompts = workload.prompts(load_tokenizer(root, trust_remote_code=trust_remote_code), more=warmups)
    target = Target(address, name, stream, ignore_eos, temperature)
    if warmups:
        first = Workload(warmups, workload.input_len, workload.output_len)
        await measure(target, first, prompts[workload.num_prompts :])
    with _bar(workload.num_prompts) as (bar, task):
        run = await measure(target, workload, prompts[: workload.num_prompts], done=lambda: bar.advance(task))
    errors = [record.error for record in run.records if record.error is not None]
    if errors:
        error_console().print(f"{len(errors)} requests failed, the first one with: {errors[0]}", markup=False)
    if len(errors) == len(run.records):
        raise HttpError("every request failed")
    return {"model": name, "weights": note} | summarise(run)


async def _served(address: Address, model: str | None, tokenizer: str | None) -> tuple[str, str, str | None]:
    """Names of the model and of its tokenizer, where they were not given those of the server's first model, and what was done to
    its weights."""
    listed = await fetch_json(address, "GET", "/v1/models")
    try:
        first = listed["data"][0]
        return model or first["id"], tokenizer or first.get("root") or first["id"], first.get("weights")
    except (KeyError, IndexError, TypeError) as error:
        raise HttpError("the server lists no models: give --model and --tokenizer") from error


@bench_app.command("throughput")
@with_settings(engine=(*ENGINE_OPTIONS, *BATCH_OPTIONS))
def bench_throughput(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    *,
    retrieval_head: Annotated[
        str, typer.Option("--retrieval-head", metavar="DIR|auto|none", help="Retrieval head; 'auto' takes the checkpoint's own.")
    ] = "auto",
    num_prompts: NumPrompts = 100,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    num_warmups: NumWarmups = 1,
    settings: Settings,
) -> None:
    """Generate for random prompts with the offline engine, all at once."""
    workload = Workload(num_prompts, input_len, output_len)
    llm = load_llm(model, retrieval_head, settings)
    from specontext import SamplingParams

    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_len)
    prompts = workload.prompts(llm.tokenizer, more=num_warmups)
    if num_warmups:
        llm.generate(prompts[num_prompts:], params)
    began, worked = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts[:num_prompts], params, progress=True)
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    made = sum(len(output.token_ids) for output in outputs)
    _print(
        {
            "model": model,
            "weights": llm.engine.loaded.weights_note,
            "num_prompts": num_prompts,
            "input_len": input_len,
            "output_len": output_len,
            "max_num_seqs": llm.engine.config.max_num_seqs,
            "duration": seconds,
            "cpu_seconds": worked,
            "request_throughput": num_prompts / seconds,
            "output_throughput": made / seconds,
            "total_token_throughput": (made + num_prompts * input_len) / seconds,
        }
    )


def _print(result: dict[str, Any]) -> None:
    """The table, then the line of JSON."""
    table = Table(show_header=False, box=None)
    for name, value in result.items():
        if value is not None:
            kind = name.removesuffix("_ms").partition("_")[2]
            label = f"{name} ({TIMES[kind]})" if kind in TIMES and name.startswith("mean") else name
            table.add_row(label, f"{value:,.2f}" if isinstance(value, float) else str(value))
    Console(file=sys.stdout, highlight=False, soft_wrap=True).print(table)
    print(json.dumps(result), flush=True)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[tuple[Progress, TaskID]]:
    """A bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar, bar.add_task("requests", total=total)
