"""Drawing of a memory plan: memory by part, and the layers whose KV is on the GPU, against context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specontext.cli.plan_report import MERGED, NAMES
from specontext.cli.plan_throughput import Throughput
from specontext.cli.planned import Planned
from specontext.cli.terminal import UsageError, human_bytes
from specontext.errors import SpeContextError
from specontext.installing import install_command
from specontext.memory.planner import MemoryPlan

ENDINGS = (".png", ".pdf", ".svg")
POINTS = 1200
COLOURS = {  # Okabe and Ito's for what grows, greys for what does not
    "weights": "#5B6770",
    "retrieval_head": "#D55E00",
    "runtime": "#A9B1B7",
    "graphs": "#8C97A0",
    "tables": "#CFD4D8",
    "workspace": "#E3E6E8",
    "keys": "#CC79A7",
    "slots": "#E69F00",
    "kv_device": "#0072B2",
    "kv_host": "#009E73",
}
DEVICE = tuple(part for part in COLOURS if part != "kv_host")


def check_plot(file: Path) -> None:
    """Raises an error unless a plot can be written to this file."""
    if file.suffix.lower() not in ENDINGS:
        raise UsageError(f"--plot {file}: the name must end in {', '.join(ENDINGS)}")
    if not file.parent.is_dir():
        raise UsageError(f"--plot {file}: there is no directory {file.parent}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SpeContextError(f"plots need matplotlib: {install_command('plots')}") from error


def draw(planned: Planned, file: Path) -> None:
    """Write the plot.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        figure(planned).savefig(file, dpi=150)
    except OSError as error:
        raise UsageError(f"--plot {file} cannot be written: {error.strerror or error}") from error


def figure(planned: Planned) -> Any:
    """Panels over one axis of length: GPU memory by part, host memory where layers are offloaded, layers on the GPU; below them
    tokens a second against requests."""
    from matplotlib.figure import Figure

    plan = planned.plan
    top = _right_end(plan)
    served = [length for length in (max(1, round(top * n / POINTS)) for n in range(POINTS + 1)) if length <= plan.max_len]
    counts = [plan.bytes_at(length) for length in served]
    offloads = any(count["kv_host"] for count in counts)
    heights = (10, 4, 7) if offloads else (10, 7)
    made = Figure(figsize=(9.6, 11.6 if offloads else 10.0), layout="constrained")
    figures: Any = made.subfigures(2, 1, height_ratios=(sum(heights), 8))
    upper, lower = figures
    panels = upper.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_memory(panels[0], plan, served, counts)
    if offloads:
        _draw_host(panels[1], plan, served, counts)
    _draw_layers(panels[-1], plan, top)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#000000", alpha=0.08)
        axes.set_axisbelow(True)
    upper.align_ylabels(list(panels))
    panels[-1].set_xlim(0, top)
    panels[-1].set_xlabel("context length of each request (tokens)")
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    requests = "1 request" if plan.requests == 1 else f"{plan.requests} requests"
    title = f"{planned.facts.name} in {human_bytes(plan.gpu_memory)}: {requests}, budget {planned.run.budget:,}"
    draw_throughput(lower.subplots(), planned.throughput)
    made.suptitle(f"{title}, mode {plan.model.mode}", fontsize=12, fontweight="bold", x=0.01, ha="left")
    return made


def _right_end(plan: MemoryPlan) -> int:
    """A little beyond the longest context that fits, or the longest that is asked for."""
    return max(16, min(plan.max_model_len, round(1.12 * plan.max_len)) if plan.max_len else plan.max_model_len)


def _draw_memory(axes: Any, plan: MemoryPlan, served: list[int], counts: list[dict[str, int]]) -> None:
    """Bands of parts up to the limit; parts too thin to be seen are one band."""
    unit, name = _unit(plan.gpu_memory)
    if served:
        thin = 0.002 * plan.gpu_memory
        shown = [part for part in DEVICE if any(count.get(part, 0) > thin for count in counts)]
        bands = [[count[part] / unit for count in counts] for part in shown]
        labels = [MERGED.replace(", ", ",\n") if part == "kv_device" and plan.model.merged else NAMES[part] for part in shown]
        colours = [COLOURS[part] for part in shown]
        rest = [sum(count.get(part, 0) for part in DEVICE if part not in shown) / unit for count in counts]
        if max(rest) > 0:
            bands, labels, colours = [rest, *bands], ["other, less than 0.2 % each", *labels], ["#F0F1F2", *colours]
        axes.stackplot(served, bands, labels=labels, colors=colours, edgecolor="white", linewidth=0.4)
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _limit(axes, plan.gpu_memory / unit, f"GPU memory, {human_bytes(plan.gpu_memory)}")
    axes.set_ylabel(f"on the GPU ({name})")
    axes.set_ylim(0, 1.1 * plan.gpu_memory / unit)


def _draw_host(axes: Any, plan: MemoryPlan, served: list[int], counts: list[dict[str, int]]) -> None:
    most = max(count["kv_host"] for count in counts)
    unit, name = _unit(most)
    values = [count["kv_host"] / unit for count in counts]
    axes.fill_between(served, values, color=COLOURS["kv_host"], alpha=0.25, linewidth=0)
    axes.plot(served, values, color=COLOURS["kv_host"], linewidth=1.8)
    axes.set_ylim(0, 1.25 * most / unit)
    if plan.host_memory is not None and plan.host_memory < 1.5 * most:
        _limit(axes, plan.host_memory / unit, f"host memory, {human_bytes(plan.host_memory)}")
        axes.set_ylim(0, 1.25 * max(most, plan.host_memory) / unit)
    axes.set_ylabel(f"on the host ({name})")


def _unit(count: int) -> tuple[int, str]:
    return (1 << 30, "GiB") if count >= 1 << 30 else (1 << 20, "MiB")


def _limit(axes: Any, value: float, text: str) -> None:
    axes.axhline(value, color="#222222", linewidth=1.2)
    place: dict[str, Any] = {"xytext": (5, 3), "textcoords": "offset points", "va": "bottom", "fontsize": 8.5}
    axes.annotate(text, (0, value), xycoords=("axes fraction", "data"), **place)


def _draw_layers(axes: Any, plan: MemoryPlan, top: int) -> None:
    """A staircase whose steps are the thresholds."""
    ends = [0]
    counts = []
    for offloaded, most in enumerate(plan.reach):
        end = min(most, plan.max_len, top)
        if end > ends[-1]:
            ends.append(end)
            counts.append(plan.layers - offloaded)
    if counts:
        axes.stairs(counts, ends, baseline=0, fill=True, color=COLOURS["kv_device"], alpha=0.18)
        axes.stairs(counts, ends, baseline=None, color=COLOURS["kv_device"], linewidth=2)
    axes.set_ylim(0, plan.layers * 1.18)
    axes.set_ylabel("layers with KV on the GPU")
    step = max(1, round(plan.layers / 4))
    axes.set_yticks(sorted({*range(0, plan.layers - step // 2, step), plan.layers}))
    marks = [(plan.max_len_resident, "all KV on the GPU up to {:,}")] if 0 < plan.max_len_resident < plan.max_len else []
    if plan.max_len:
        why = {"model": "the longest that is asked for", "gpu_memory": "limited by the GPU", "host_memory": "limited by the host"}
        marks.append((plan.max_len, "{:,}, " + why[plan.limited_by]))
    for length, text in marks:
        axes.axvline(length, color="#222222", linewidth=0.9, linestyle=":")
        right = length > 0.6 * top
        axes.annotate(
            text.format(length),
            (length, plan.layers * 1.16),
            xytext=(-5 if right else 5, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            fontsize=9,
        )
    if not plan.max_len:
        axes.text(0.5, 0.5, "nothing fits", transform=axes.transAxes, ha="center", color="#D55E00", fontsize=12)


def draw_throughput(axes: Any, throughput: Throughput) -> None:
    """A line for each length, with its choice as a dot."""
    from matplotlib import colormaps

    lengths = [length for length, curve in throughput.curves.items() if curve]
    for place, length in enumerate(lengths):
        colour, curve = colormaps["viridis"](0.9 * place / max(1, len(lengths) - 1)), throughput.curves[length]
        axes.plot([one.requests for one in curve], [one.tokens_per_s for one in curve], color=colour, label=f"{length:,} tokens")
        if (chosen := throughput.choice(length)) is not None:
            axes.plot([chosen.requests], [chosen.tokens_per_s], "o", color=colour, markersize=5)
    if lengths:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests at the same time (dots: the choice)")
    axes.set_ylabel("expected tokens/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#000000", alpha=0.08)
