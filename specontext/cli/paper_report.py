"""The paper's tables on a terminal and as a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from specontext.cli.terminal import UsageError

RATIOS = {
    "over_hf_eager_4": "x eager (4)",
    "over_hf_eager": "x eager",
    "over_hf_sdpa": "x SDPA",
    "over_hf_static": "x static",
    "over_full": "x full",
}
COLOURS = ("#5B6770", "#A9B1B7", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def print_report(report: dict[str, Any]) -> None:
    """A table for each part."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    out.print(f"table {report['table']} on {report['device']}; weights {report['weights']}", markup=False)
    for part in report["parts"]:
        out.print(part_table(part, [row for row in report["rows"] if row["part"] == part]))
    for line in notes(report):
        out.print(line, style="dim", markup=False, soft_wrap=True)


def part_table(part: str, rows: list[dict[str, Any]]) -> Table:
    """A row for each system; below them why some were not measured."""
    table = Table(
        title=escape(part),
        title_justify="left",
        title_style="bold",
        caption=escape("\n".join(f"{row['system']}: {row['error']}" for row in rows if row.get("error"))) or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown = {name: words for name, words in RATIOS.items() if any(row.get(name) for row in rows)}
    measured = ("system", "requests", "tokens/s", "prefill", "first step", "last step", "layers away", "x floor")
    for name in (*measured, *shown.values()):
        widest = max(map(len, name.split()))
        table.add_column(name, justify="left" if name == "system" else "right", no_wrap=name == "system", min_width=widest)
    for row in rows:
        if row.get("error"):
            table.add_row(escape(row["system"]), str(row["requests"] or "–"), "–")
            continue
        steps, away = list((row.get("step_s") or {}).values()), list((row.get("offloaded_layers") or {}).values())
        table.add_row(
            escape(row["system"]),
            f"{row['requests']} of {row['concurrency']}" if "concurrency" in row else str(row["requests"]),
            f"{row['tokens_per_s']:,.1f}",
            f"{row['prefill_s']:.2f} s" if row.get("prefill_s") else "",
            *((f"{1000 * steps[place]:.2f} ms" if steps else "") for place in (0, -1)),
            " .. ".join(dict.fromkeys((str(away[0]), str(away[-1])))) if away else "",
            f"{row['decode_over_floor']:.2f}" if row.get("decode_over_floor") else "",
            *(f"{row[name]:.2f}" if row.get(name) else "" for name in shown),
        )
    return table


def notes(report: dict[str, Any]) -> list[str]:
    """How it was measured."""
    lines = [
        "tokens/s: outputs over prefill and decode steps of one batch that starts together. Steps are measured at some lengths "
        "of the growing context, through scheduler, runner and sampler, and summed by the trapezoidal rule.",
        f"Selections are replayed at an overlap of {report['overlap']:g}; the floor is bytes over measured bandwidths.",
    ]
    if any(row.get("linked") for row in report["rows"]):
        lines.append("Ratios to a system of another part go by way of our full attention, or else of SDPA, which both have.")
    lines += [
        f"{row['system']} runs out of memory behind {row['reached']:,} tokens: its tokens/s are those up to there."
        for row in report["rows"]
        if row.get("reached")
    ]
    if any(row.get("step_s_by_default") for row in report["rows"]):
        lines.append(
            "Decode steps of Hugging Face's SDPA are those without cuDNN's attention where they are shorter: it plans anew for "
            "each new length. What they take as PyTorch chooses by itself is in `step_s_by_default`."
        )
    lines += [
        f"{row['system']} reads its prompt in chunks of {row['prefill_chunk']:,} tokens: more at once does not fit."
        for row in report["rows"]
        if row.get("prefill_chunk")
    ]
    lines += [f"Sampled over whole run: {share:.3f}." for share in report["sampled_over_whole"]]
    lines += [f"The plan's number of requests over the best that was found: {share:.3f}." for share in report["choice_over_best"]]
    return lines


def draw(report: dict[str, Any], file: Path) -> None:
    """Bars of tokens a second: a group for each model and column, a bar for each system; of several parts the last counts.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    found: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        if row.get("tokens_per_s"):
            at = f"{row['requests']} at once" if "concurrency" in row else ""
            group = "\n".join(word for word in (row["model"], row["column"], at) if word)
            found.setdefault(group, {})[row["system"]] = row["tokens_per_s"]
    systems = [name for name in report["systems"] if any(name in group for group in found.values())]
    made = Figure(figsize=(max(6.4, 1.2 + 0.16 * len(systems) * len(found)), 4.8), layout="constrained")
    axes, width = made.subplots(), 0.85 / max(1, len(systems))
    for number, system in enumerate(systems):
        places = [place for place, group in enumerate(found.values()) if system in group]
        heights = [group[system] for group in found.values() if system in group]
        shifted = [place + (number - (len(systems) - 1) / 2) * width for place in places]
        axes.bar(shifted, heights, width, label=system, color=COLOURS[number % len(COLOURS)])
    if found:
        axes.set_yscale("log")
        axes.set_xticks(range(len(found)), list(found), fontsize=8)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    axes.set_ylabel("tokens/s")
    axes.set_title(f"{report['table']} on {report['device']}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        made.savefig(file, dpi=150)
    except OSError as error:
        raise UsageError(f"--plot {file} cannot be written: {error.strerror or error}") from error
