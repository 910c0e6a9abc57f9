"""`specontext plan`: what fits into a GPU's memory, from a model's config alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specontext.cli.named_model import find_facts, with_kv_formats
from specontext.cli.options import OWN_CODE, Settings, parse_bandwidth, parse_size, with_settings
from specontext.cli.plan_throughput import MOST_CHOSEN, machine_of
from specontext.cli.planned import as_object, make_plan
from specontext.cli.terminal import UsageError, human_bytes, named_path
from specontext.config import DTYPES, KV_CACHE_DTYPES, QUANTIZATIONS, STEP_TOKENS

if TYPE_CHECKING:
    from specontext.memory.speed import Bandwidths
    from specontext.memory.throughput import ServiceLimits

MODES = ("measured", "paper")
LEAST_SIZE, MOST_SIZE = 1 << 20, 1 << 50
MOST_REQUESTS = 1 << 16


@with_settings(method=(), engine=OWN_CODE)
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_PRESET",
            help="A model's name, directory, GGUF file or Hub id, or a preset; no weights are read.",
            show_default=False,
        ),
    ] = None,
    *,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="GPU memory for everything: weights, buffers, KV.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option("--host-memory", metavar="SIZE", help="Host memory for KV. Default: no limit.")
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size", "-tp", help="GPUs that share the model: everything is for each of them, but --host-memory."
        ),
    ] = 1,
    requests: Annotated[int, typer.Option("--requests", help="Requests at the same time, of equal length.")] = 1,
    budget: Annotated[
        int | None,
        typer.Option("--budget", help="KV entries that a KV head reads in a step. Default: the head's, else 2048."),
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", help="Device slots for each KV head of an offloaded layer. Default: the budget.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", help="Longest context in tokens. Default: the model's own maximum.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Number format: auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            help="Linear layers rounded to fp8 or int4 when they are loaded. Default: as the checkpoint has them.",
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", help="Number format of KV: auto (that of the model), fp8 or int8.")
    ] = "auto",
    host_kv_dtype: Annotated[
        str, typer.Option("--host-kv-dtype", help="The same of layers on the host alone: auto (as on the GPU), fp8 or int8.")
    ] = "auto",
    retrieval_head: Annotated[
        str,
        typer.Option(
            "--retrieval-head",
            metavar="DIR|auto|none",
            help="Its size counts; 'auto' is the model's own, else that of an EAGLE-3 draft, 'none' no head.",
        ),
    ] = "auto",
    mode: Annotated[
        str,
        typer.Option("--mode", help="'measured' counts what the engine allocates; 'paper' is eq. 6-7, with 30 % for buffers."),
    ] = "measured",
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", metavar="SIZE", help="Run-time buffers that were measured. Default: a formula's estimate."),
    ] = None,
    graphs: Annotated[
        str | None, typer.Option("--graphs", metavar="SIZE", help="Memory set aside for CUDA graphs. Default: none.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-num-batched-tokens",
            help=f"Tokens of one engine step, for the estimate of run-time buffers. Default: {STEP_TOKENS['cuda']}, fewer where "
            "memory is short.",
        ),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth",
            metavar="RATE|measure",
            help="Bandwidth of GPU memory, such as 3.3TB/s, for step times; 'measure' measures both on this machine.",
        ),
    ] = None,
    host_bandwidth: Annotated[
        str | None, typer.Option("--host-bandwidth", metavar="RATE", help="Bandwidth from host to GPU, such as 50GB/s.")
    ] = None,
    overlap: Annotated[
        float, typer.Option("--overlap", help="Share of the selected entries that the last step selected too, for step times.")
    ] = 0.85,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", help="Most requests at once, for the choice of the most tokens a second.")
    ] = MOST_CHOSEN,
    min_num_seqs: Annotated[
        int, typer.Option("--min-num-seqs", help="Least requests at once for that choice, as far as so many fit.")
    ] = 1,
    max_tpot_ms: Annotated[
        float | None, typer.Option("--max-tpot-ms", help="Most milliseconds from token to token of a request for that choice.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="F.png", parser=named_path, help="Draw memory and resident layers against length, and tokens/s."
        ),
    ] = None,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="Print the presets and end.")] = False,
    settings: Settings,
) -> None:
    """Plan memory: which contexts fit, with how many layers' KV on the GPU, and how many requests at once are fastest.

    Sizes are written as 24GiB or 4096MiB (powers of two) or as 24GB (powers of ten), bandwidths as 3.3TB/s.
    """
    if list_presets:
        from specontext.cli.plan_report import print_presets

        print_presets(as_json=as_json)
        return
    if model is None:
        raise UsageError("name a model: a directory with a config.json, 'nano', a Hub id, or a preset (--list-presets)")
    if gpu_memory is None:
        raise UsageError("give the GPU's memory: --gpu-memory 24GiB, for example")
    device_bytes = _memory("--gpu-memory", gpu_memory)
    host_bytes = None if host_memory is None else _memory("--host-memory", host_memory)
    _check(requests=requests, max_num_batched_tokens=max_num_batched_tokens, overlap=overlap, mode=mode, dtype=dtype)
    for name, value in (("kv_cache_dtype", kv_cache_dtype), ("host_kv_dtype", host_kv_dtype)):
        if value not in KV_CACHE_DTYPES:
            raise UsageError(f"unknown {name} '{value}': choose one of {', '.join(KV_CACHE_DTYPES)}")
    if "auto" not in (kv_cache_dtype, host_kv_dtype) and kv_cache_dtype != host_kv_dtype:
        raise UsageError(
            f"--kv-cache-dtype {kv_cache_dtype} and --host-kv-dtype {host_kv_dtype} are two kinds of 8 bits: leave one out"
        )
    only_measured = {"--slots": slots, "--runtime": runtime, "--graphs": graphs, "--quantization": quantization}
    if mode == "paper":
        named = [name for name, value in only_measured.items() if value is not None]
        named += ["--dtype float32"] if dtype == "float32" else []
        named += [f"--kv-cache-dtype {kv_cache_dtype}"] if kv_cache_dtype != "auto" else []
        named += [f"--host-kv-dtype {host_kv_dtype}"] if host_kv_dtype != "auto" else []
        if named:
            what = named[0]
            raise UsageError(f"{what} has no meaning in mode paper, whose formulas fix it: leave it out or take --mode measured")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise UsageError(f"unknown quantization '{quantization}': choose one of {', '.join(QUANTIZATIONS)}")
    if plot is not None:
        from specontext.cli.plan_plot import check_plot

        check_plot(plot)
    if tensor_parallel_size < 1:
        raise UsageError(f"--tensor-parallel-size must be at least 1, got {tensor_parallel_size}")
    if tensor_parallel_size > 1 and mode == "paper":
        raise UsageError("--tensor-parallel-size has no meaning in mode paper, whose formulas are of one GPU: leave it out")
    limits = _limits(max_num_seqs, min_num_seqs, max_tpot_ms)
    speed = _speed(bandwidth, host_bandwidth)
    if max_model_len is not None and max_model_len < 1:
        raise UsageError(f"--max-model-len must be at least 1, got {max_model_len}")
    facts = find_facts(model, dtype, retrieval_head, quantization=quantization, max_model_len=max_model_len, **settings.engine)
    facts = with_kv_formats(facts, kv_cache_dtype, host_kv_dtype)
    planned = make_plan(
        facts,
        mode=mode,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory=device_bytes,
        host_memory=host_bytes,
        requests=requests,
        budget=budget,
        slots=slots,
        max_model_len=max_model_len,
        runtime=None if runtime is None else parse_size(runtime),
        graphs=0 if graphs is None else parse_size(graphs),
        max_batched_tokens=max_num_batched_tokens,
        machine=machine_of(speed),
        limits=limits,
        speed=speed,
        overlap=overlap,
    )
    if plot is not None:
        from specontext.cli.plan_plot import draw

        draw(planned, plot)
    if as_json:
        print(json.dumps(as_object(planned)))
        return
    from specontext.cli.plan_report import print_plan

    print_plan(planned)
    if plot is not None:
        print(plot)


def _memory(option: str, text: str) -> int:
    size = parse_size(text)
    if size < LEAST_SIZE:
        hint = f", such as {text.strip()}GiB" if text.strip().isdigit() else ", such as 24GiB"
        raise UsageError(f"{option} {text} is only {human_bytes(size)}: write it with its unit{hint}")
    if size > MOST_SIZE:
        raise UsageError(f"{option} {text} is {human_bytes(size)}, more than any machine has: check the unit, such as 24GiB")
    return size


def _check(*, requests: int, max_num_batched_tokens: int | None, overlap: float, mode: str, dtype: str) -> None:
    if not 1 <= requests <= MOST_REQUESTS:
        raise UsageError(f"--requests must be 1 to {MOST_REQUESTS:,}, got {requests}")
    if max_num_batched_tokens is not None and max_num_batched_tokens < 1:
        raise UsageError(f"--max-num-batched-tokens must be at least 1, got {max_num_batched_tokens}")
    if not 0 <= overlap <= 1:
        raise UsageError(f"--overlap must be a share from 0 to 1, got {overlap:g}")
    if mode not in MODES:
        raise UsageError(f"unknown mode '{mode}': choose one of {', '.join(MODES)}")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}")


def _limits(most: int, least: int, max_tpot_ms: float | None) -> ServiceLimits:
    from specontext.memory.throughput import ServiceLimits

    if not 1 <= most <= MOST_REQUESTS:
        raise UsageError(f"--max-num-seqs must be 1 to {MOST_REQUESTS:,}, got {most}")
    if not 1 <= least <= most:
        raise UsageError(f"--min-num-seqs must be 1 to --max-num-seqs, which is {most}, got {least}")
    if max_tpot_ms is not None and not 0 < max_tpot_ms < math.inf:
        raise UsageError(f"--max-tpot-ms must be a number above 0, got {max_tpot_ms:g}: leave it out for no limit")
    return ServiceLimits(most, least, max_tpot_ms)


def _speed(bandwidth: str | None, host_bandwidth: str | None) -> Bandwidths | None:
    """Bandwidths from the options, measured here where that was asked for."""
    if bandwidth is None and host_bandwidth is None:
        return None
    from specontext.memory.speed import Bandwidths, measure_bandwidths

    if bandwidth != "measure":
        if bandwidth is None or host_bandwidth is None:
            missing = "--bandwidth 3.3TB/s" if bandwidth is None else "--host-bandwidth 50GB/s"
            raise UsageError(f"step times need both bandwidths: give {missing} too, for example, or --bandwidth measure")
        return Bandwidths(parse_bandwidth(bandwidth), parse_bandwidth(host_bandwidth))
    given = None if host_bandwidth is None else parse_bandwidth(host_bandwidth)
    import torch

    found = measure_bandwidths(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return found if given is None else Bandwidths(found.device, given)
