"""The plot of `adaptive.py`: our three curves with the layers that left, and the paper's cliff beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptive_report import PAPER

COLOURS = {"adaptive": "#1b7837", "never": "#4393c3", "all": "#d6604d", "layers": "#8c8c8c", "paper": "#762a83"}
NAMES = {"adaptive": "adaptive", "never": "never offload", "all": "all layers offloaded"}


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 6.4), constrained_layout=True)
    grid = figure.add_gridspec(2, 2, width_ratios=(3.1, 1), height_ratios=(3, 1))
    speed = figure.add_subplot(grid[0, 0])
    layers = figure.add_subplot(grid[1, 0], sharex=speed)
    paper = figure.add_subplot(grid[:, 1])
    draw_speed(speed, report)
    draw_layers(layers, report)
    draw_paper(paper, report)
    for ax in (speed, layers, paper):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#ebebeb", linewidth=0.8)
        ax.set_axisbelow(True)
    requests = f"{report['requests']} request{'s' if report['requests'] > 1 else ''}"
    words = f"{report['model']} ({report['dtype']}), {requests}, budget {report['budget']:,}, {report['machine']}"
    words += ", seconds of the process" if report["clock"] == "cpu" else ""
    figure.suptitle(f"Decode speed while the KV outgrows the device\n{words}", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_speed(ax: Any, report: dict[str, Any]) -> None:
    points, crossings = report["points"], report["crossings"]
    for crossing in crossings:
        ax.axvline(crossing["length"], color="#e3e3e3", linewidth=0.8, zorder=0)
    for name in ("adaptive", "never", "all"):
        line = [(p["length"], p["tokens_per_s"][name]) for p in points if p["tokens_per_s"][name] is not None]
        if not line:
            continue
        first = name == "adaptive"
        ax.plot(
            *zip(*line, strict=True),
            color=COLOURS[name],
            linewidth=2.4 if first else 1.6,
            marker="o",
            markersize=3.8 if first else 3,
            zorder=3 if first else 2,
            label=NAMES[name],
        )
    last = report["last_length"].get("never")
    ended = [p["tokens_per_s"]["never"] for p in points if p["tokens_per_s"]["never"] is not None]
    if last is not None and ended and last < points[-1]["length"]:
        ax.plot([last], [ended[-1]], marker="X", color=COLOURS["never"], markersize=10, zorder=4, linestyle="none")
        ax.annotate(
            f"cannot: {last:,} tokens fill the device",
            (last, ended[-1]),
            xytext=(8, 12),
            textcoords="offset points",
            color=COLOURS["never"],
            fontsize=9,
        )
    most = max(speed for p in points for speed in p["tokens_per_s"].values() if speed is not None)
    ax.set_ylim(0, 1.15 * most)
    ax.set_ylabel("tokens a second, all requests")
    ax.legend(loc="lower left", frameon=False)
    ax.tick_params(labelbottom=False)
    ax.set_title("ours: measured; grey lines: a layer left the device", loc="left", fontsize=10)


def draw_layers(ax: Any, report: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    points = report["points"]
    first, last = points[0], points[-1]
    steps = [(first["length"], first["offloaded"])]
    steps += [(c["length"], c["offloaded"]) for c in report["crossings"]]
    steps.append((last["length"], last["offloaded"]))
    lengths, counts = zip(*sorted(steps), strict=True)
    ax.step(lengths, counts, where="post", color=COLOURS["layers"], linewidth=1.6)
    ax.fill_between(lengths, counts, step="post", color=COLOURS["layers"], alpha=0.18, linewidth=0)
    ax.set_ylim(0, report["layers"] * 1.08)
    ax.set_ylabel(f"layers on the\nhost, of {report['layers']}")
    ax.set_xscale("log")
    ax.set_xlim(first["length"] * 0.97, last["length"] * 1.03)
    ax.xaxis.set_major_locator(FixedLocator(nice_lengths(first["length"], last["length"])))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    ax.set_xlabel("tokens of each request (logarithmic)")


def nice_lengths(low: float, high: float) -> list[int]:
    """Round numbers between two lengths, about six to a decade."""
    candidates = [int(lead * 10**power) for power in range(1, 7) for lead in (1, 1.5, 2, 3, 4, 6, 8)]
    return [length for length in candidates if low * 0.97 <= length <= high * 1.03]


def draw_paper(ax: Any, report: dict[str, Any]) -> None:
    lengths, speeds = PAPER["lengths"], PAPER["tokens_per_s"]
    names = [f"{length // 1024}K" for length in lengths]
    ax.plot(names, speeds, color=COLOURS["paper"], marker="o", markersize=7, linewidth=2.2)
    for name, speed, where, place in zip(names, speeds, ("all on the GPU", "all on the CPU"), ((0, 10), (-12, -22)), strict=True):
        beside = {"xytext": place, "textcoords": "offset points", "ha": "center" if place[0] == 0 else "right"}
        ax.annotate(f"{speed} tok/s\n{where}", (name, speed), fontsize=9, **beside)
    ax.set_xlim(-0.5, 1.5)
    ax.set_ylim(0, max(speeds) * 1.25)
    ax.set_ylabel("tokens a second")
    ax.set_xlabel("tokens of each request")
    fall = 1 - speeds[1] / speeds[0]
    ax.set_title(
        f"the paper's numbers, not ours:\na cliff of {fall:.0%} where offloading is\nall or nothing ({PAPER['model']})",
        loc="left",
        fontsize=10,
    )
    cost = report["summary"]["most_cost"]
    if cost is not None:
        ax.text(
            0.5,
            0.5,
            f"ours, left: at most {max(cost, 0):.1%}\nat one crossing",
            transform=ax.transAxes,
            fontsize=9,
            color=COLOURS["adaptive"],
        )
