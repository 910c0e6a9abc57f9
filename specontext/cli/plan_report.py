"""A memory plan in words and tables."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from specontext.cli.plan_throughput import GIVEN
from specontext.cli.planned import Planned, row_at, shown_lengths
from specontext.cli.terminal import human_bytes
from specontext.memory.planner import MemoryPlan
from specontext.memory.preset import NUMBER_FORMATS
from specontext.memory.presets import PRESETS
from specontext.memory.throughput import Operation

FILE_WIDTH = 110
BAR = 16  # characters
SHOWN_LENGTHS = 6  # of the table of tokens/s
NAMES = {
    "weights": "weights",
    "retrieval_head": "retrieval head",
    "runtime": "run-time buffers",
    "graphs": "CUDA graphs",
    "tables": "page and slot tables",
    "workspace": "score workspace",
    "keys": "keys of the head",
    "slots": "slots of offloaded layers",
    "windows": "KV of layers with a window",
    "states": "states of layers without KV",
    "kv_device": "KV on the GPU",
    "kv_host": "KV on the host",
}
MERGED = "KV on the GPU, with keys and slots"


def console(file_width: int = FILE_WIDTH) -> Console:
    """Standard output, of a fixed width when it is a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else file_width)


def print_plan(planned: Planned) -> None:
    """Everything, for people."""
    out = console()
    for line in heading(planned):
        out.print(escape(line), soft_wrap=True)
    out.print()
    tables = (longest(planned), parts(planned), against_length(planned), threshold_table(planned.plan), throughput_table(planned))
    for table in tables:
        out.print(table)
    for line in notes(planned):
        out.print(escape(line), style="dim", soft_wrap=True)


def heading(planned: Planned) -> list[str]:
    """The model, the memory and what is asked of them."""
    plan, facts, run, shape = planned.plan, planned.facts, planned.run, planned.facts.shape
    others = {"with a window": len(shape.windowed), "without KV of their own": len(shape.readers)}
    others |= {"without attention": len(shape.inattentive)}
    more = ", ".join(f"{count} more {which}" for which, count in others.items() if count)
    if shape.latent is not None:
        kept = f"latents of {shape.latent.rank} + {shape.latent.rotated} numbers"
    else:
        kept = f"{shape.kv_heads} KV heads x {shape.head_dim}"
    more = f"{shape.layers} layers{f' ({more})' if more else ''}"
    layers = f"{shape.depth} layers, all with a window" if shape.only_windows else more
    heads = f"{layers}, {kept}"
    dtype = str(shape.dtype).removeprefix("torch.")
    kv = "" if shape.kv_dtype is None else f", {str(shape.kv_dtype).removeprefix('torch.')} with scales"
    if shape.host_kv_dtype is not None:
        whole = human_bytes(shape.on_host.kv_bytes_per_token)
        kv = f", {whole} on the host as {str(shape.host_kv_dtype).removeprefix('torch.')} with scales"
    host = "host memory without limit" if plan.host_memory is None else f"{human_bytes(plan.host_memory)} of host memory"
    slots = "" if run.slots == run.budget else f", {run.slots:,} slots"
    limit = f" ({shape.limited_by})" if shape.limited_by and plan.max_model_len == shape.max_position else ""
    requests = "1 request" if plan.requests == 1 else f"{plan.requests} requests"
    note = "" if facts.weights_note is None else f" ({facts.weights_note})"
    each = "" if planned.ranks == 1 else f"each of {planned.ranks} ranks of "
    return [
        f"{each}{facts.name}: {_count(facts.parameters)} parameters, {heads}, {dtype}{note}; "
        f"{human_bytes(facts.kv_bytes_per_token)} of KV a token{kv}",
        f"retrieval head: {_count(facts.head.parameters)} parameters ({facts.head.source})",
        f"{human_bytes(plan.gpu_memory)} of GPU memory, {host}; {requests}, budget {run.budget:,}{slots}, contexts of up to "
        f"{plan.max_model_len:,} tokens{limit}; mode {plan.model.mode}",
    ]


def longest(planned: Planned) -> Table:
    """Longest contexts, and what ends them."""
    plan = planned.plan
    table = _table("Longest context of each request, in tokens")
    table.show_header = False
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    rows = [("KV of all layers on the GPU", plan.max_len_resident), ("KV of layers on the host as needed", plan.max_len_device)]
    if plan.host_memory is not None:
        rows.append((f"the same within {human_bytes(plan.host_memory)} of host memory", plan.max_len_offloaded))
    for name, tokens in rows:
        table.add_row(name, f"{min(tokens, plan.max_model_len):,}", _beyond(plan, tokens))
    return table


def _beyond(plan: MemoryPlan, tokens: int) -> str:
    if tokens < 1:
        return f"{human_bytes(-plan.available)} too little" if plan.available < 0 else "too little memory"
    if tokens <= plan.max_model_len:
        return ""
    if plan.facts.shape.only_windows:
        return "the most that is asked for; nothing grows with it"
    return f"the most that is asked for; memory would hold {tokens:,}"


def parts(planned: Planned) -> Table:
    """Bytes by part where all layers are resident for the last time, and at the longest context."""
    plan = planned.plan
    lengths = sorted({min(plan.max_len_resident, plan.max_len), plan.max_len})
    table = _table("What fits where")
    table.add_column("")
    for length in lengths:
        offloaded = plan.offloaded_at(length)
        resident = 0 if offloaded is None else plan.layers - offloaded
        where = "" if plan.facts.shape.only_windows else f"\n{resident} of {plan.layers} layers on the GPU"
        table.add_column(f"{length:,} tokens{where}", justify="right")
    counts = [plan.bytes_at(length) for length in lengths]
    for part in counts[0]:
        if part == "kv_host" or not any(count[part] for count in counts):
            continue
        name = MERGED if part == "kv_device" and plan.model.merged else NAMES[part]
        table.add_row(name, *(human_bytes(count[part]) for count in counts))
    totals = [sum(count.values()) - count["kv_host"] for count in counts]
    table.add_section()
    table.add_row("GPU", *(f"{human_bytes(total)} of {human_bytes(plan.gpu_memory)}" for total in totals))
    table.add_row("host", *(human_bytes(count["kv_host"]) for count in counts))
    return table


def against_length(planned: Planned) -> Table:
    """Resident layers, memory and expected step at some lengths."""
    plan = planned.plan
    table = _table("Layers on the GPU against context length")
    for name in ("tokens", "layers"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name in ("GPU", "host", "step at least", "tokens/s at most"):
        table.add_column(name, justify="right")
    for length in shown_lengths(plan):
        row = row_at(planned, length)
        if not row["fits"]:
            why = "too much for the GPU" if length > plan.max_len_device else "too much for the host"
            table.add_row(f"{length:,}", "–", why)
            continue
        table.add_row(f"{length:,}", str(row["resident_layers"]), _bar(row["resident_layers"], plan.layers), *_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    mark = " (loads)" if row["step_limited_by"] == "host_bandwidth" else ""
    sizes = [human_bytes(row["device_bytes"]), human_bytes(row["host_bytes"])]
    return [*sizes, f"{1000 * row['step_s']:.2f} ms{mark}", f"{row['tokens_per_s']:,.0f}"]


def _bar(count: int, of: int) -> str:
    full = max(round(BAR * count / of), min(count, 1))
    return "█" * full + "░" * (BAR - full)


def threshold_table(plan: MemoryPlan, columns: int = 8) -> Table:
    """ST_0 .. ST_L, several in a line."""
    table = _table("Thresholds ST_i: longest context with i layers offloaded")
    table.add_column("i", justify="right")
    for column in range(min(columns, plan.layers + 1)):
        table.add_column(f"+{column}", justify="right")
    for start in range(0, plan.layers + 1, columns):
        line = plan.thresholds[start : start + columns]
        table.add_row(str(start), *(f"{value:,}" if value >= 0 else "–" for value in line))
    return table


def throughput_table(planned: Planned) -> Table:
    """Expected tokens a second of some numbers of requests by length, and the choice among all."""
    found = planned.throughput
    lengths = list(found.curves)[-SHOWN_LENGTHS:]
    most = max(len(found.curves[length]) for length in lengths)
    shown = [1 << bit for bit in range(most.bit_length())]
    table = _table("Expected tokens/s against requests and their length; +i: with i layers' KV on the host")
    table.add_column("requests", justify="right")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for count in shown:
        curves = [found.curves[length] for length in lengths]
        table.add_row(str(count), *(_operation(curve[count - 1]) if count <= len(curve) else "–" for curve in curves))
    table.add_section()
    choices = [found.choice(length) for length in lengths]
    table.add_row("choice", *("–" if one is None else _operation(one) for one in choices))
    table.add_row("of requests", *("–" if one is None else str(one.requests) for one in choices))
    return table


def _operation(one: Operation) -> str:
    away = f" +{one.offloaded_layers}" if one.offloaded_layers else ""
    return f"{one.tokens_per_s:,.0f}{away}"


def notes(planned: Planned) -> list[str]:
    """What is estimated, and by which formula."""
    plan, speed, machine = planned.plan, planned.speed, planned.throughput.machine
    lines = []
    if plan.max_len < 1:
        lines.append("Nothing fits: give more GPU memory, or lower --requests, --budget or --max-model-len.")
    lines += limits_not_kept(planned)
    lines.append(f"Run-time buffers: {planned.runtime_source}." + _paper_note(plan))
    lines.append(
        f"Expected tokens/s are those of captured steps at {_rate(machine.device)} of GPU memory and {_rate(machine.host)} of "
        f"pieces from the host ({machine.name}), without prefill; {1 - planned.overlap:.0%} of the selected rows of offloaded "
        "layers are loaded in each step."
    )
    if machine.name != GIVEN:
        lines.append("Other machines: give --bandwidth 3.3TB/s --host-bandwidth 50GB/s, or --bandwidth measure.")
    lines.append(
        f"Step times are estimates, and floors: max(bytes moved on the GPU / {_rate(speed.device)}, bytes loaded / "
        f"{_rate(speed.host)}). The GPU reads the weights, the head's keys and the selected rows of all layers once; "
        f"{1 - planned.overlap:.0%} of the selected rows of offloaded layers are loaded, beside the model."
    )
    return lines


def limits_not_kept(planned: Planned) -> list[str]:
    """Limits that users set and that choices of the table do not keep, and where."""
    found, limits, where = planned.throughput, planned.throughput.limits, dict[str, list[int]]()
    for length in list(found.curves)[-SHOWN_LENGTHS:]:
        chosen = found.choice(length)
        for name in [] if chosen is None else limits.not_kept(chosen):
            where.setdefault(name, []).append(length)
    return [
        f"--{name.replace('_', '-')} {getattr(limits, name):g} cannot be kept at {', '.join(f'{n:,}' for n in lengths)} tokens: "
        "the choice is what comes nearest."
        for name, lengths in where.items()
    ]


def _paper_note(plan: MemoryPlan) -> str:
    return "" if plan.model.merged else " The driver's own memory (about 0.5 GiB a process with CUDA) is not counted."


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _rate(speed: float) -> str:
    for unit, factor in (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6)):
        if speed >= factor:
            return f"{speed / factor:.3g} {unit}"
    return f"{speed:.3g} B/s"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def print_presets(*, as_json: bool) -> None:
    """The presets with their sizes."""
    if as_json:
        print(json.dumps(list(PRESETS)))
        return
    table = _table("Presets")
    for name in ("preset", "checkpoint"):
        table.add_column(name, no_wrap=True)
    for name in ("params", "layers", "KV heads", "KV/token", "context"):
        table.add_column(name, justify="right", no_wrap=True)
    for preset in PRESETS.values():
        kv = human_bytes(preset.shape(NUMBER_FORMATS["bfloat16"]).kv_bytes_per_token)
        count, heads = _count(preset.parameters), f"{preset.kv_heads} x {preset.head_dim}"
        table.add_row(preset.name, preset.source, count, str(preset.layers), heads, kv, f"{preset.max_position >> 10}K")
    console(120).print(table)
