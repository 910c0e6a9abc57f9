"""What `adaptive.py` says about its rounds: points, crossings, their summary, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from specontext.engine.residency import Move

LEAST = 5  # steps of a median
SYSTEMS = ("adaptive", "never", "all")
PAPER = {"model": "Llama-3.1-8B, 4 requests", "lengths": [122880, 131072], "tokens_per_s": [45.3, 9.7]}  # 120K and 128K
LEAST_RATIO = 0.95  # of the adaptive speed to the better of the two others
MOST_STEP = 2.0  # medians that a step may take because of a move


@dataclass(frozen=True)
class Round:
    """One step of every engine.

    Attributes:
        visit: number of jumps before it.
        length: tokens stored of each request once the step was done.
        offloaded: layers of `adaptive` on the host in this step.
        moving: a layer of `adaptive` was on its way before or after this step.
        settling: the slots were still filling after a jump.
        captured: engines that recorded a CUDA graph in this step.
        seconds: by engine.
        moves: those that arrived before this step.
    """

    visit: int
    length: int
    offloaded: int
    moving: bool
    settling: bool
    captured: tuple[str, ...]
    seconds: dict[str, float]
    moves: tuple[Move, ...]

    @property
    def quiet(self) -> bool:
        """Whether nothing but decoding happened."""
        return not (self.moving or self.settling or self.captured)


def median_of(rounds: Sequence[Round], name: str) -> float | None:
    """Median seconds of an engine's steps; None of too few."""
    samples = [r.seconds[name] for r in rounds if name in r.seconds]
    return statistics.median(samples) if len(samples) >= LEAST else None


def speedup(rounds: Sequence[Round], other: str) -> float | None:
    """How many times faster `adaptive` was than another engine, in the rounds that both have."""
    shared = [r for r in rounds if other in r.seconds]
    ours, theirs = median_of(shared, "adaptive"), median_of(shared, other)
    return None if ours is None or theirs is None else theirs / ours


def points_of(rounds: Sequence[Round], requests: int) -> list[dict[str, Any]]:
    """Speeds at a length, by number of offloaded layers: each the median of the quiet steps between two moves or jumps."""
    found = []
    for (_, offloaded), group in groupby([r for r in rounds if r.quiet], key=lambda r: (r.visit, r.offloaded)):
        steps = list(group)
        seconds = {name: median_of(steps, name) for name in SYSTEMS}
        if seconds["adaptive"] is None:
            continue
        ratios = [ratio for ratio in (speedup(steps, name) for name in SYSTEMS[1:]) if ratio is not None]
        found.append(
            {
                "length": steps[len(steps) // 2].length,
                "offloaded": offloaded,
                "steps": len(steps),
                "tokens_per_s": {name: None if s is None else requests / s for name, s in seconds.items()},
                "ratio": min(ratios, default=None),
                "slowest_step": max(r.seconds["adaptive"] for r in steps) / seconds["adaptive"],
            }
        )
    return found


def crossings_of(rounds: Sequence[Round], steps: int, requests: int) -> list[dict[str, Any]]:
    """Every move of a layer, with the steps beside it."""
    found, start = [], 0
    for end, round_ in enumerate(rounds):
        if not round_.moving:
            start = end + 1
        elif round_.moves:
            found += [crossing(rounds, start, end, move, steps, requests) for move in round_.moves]
            start = end + 1
    return found


def crossing(rounds: Sequence[Round], start: int, end: int, move: Move, steps: int, requests: int) -> dict[str, Any]:
    """A move that was under way in the rounds start .. end; those that recorded a CUDA graph are left out of its times."""
    here = rounds[end]

    def beside(candidates: Sequence[Round], offloaded: int) -> list[Round]:
        same = [r for r in candidates if r.quiet and r.visit == here.visit and r.offloaded == offloaded]
        return same[:steps]

    before = beside(rounds[start - 1 :: -1] if start else [], rounds[start - 1].offloaded)
    after = beside(rounds[end + 1 :], here.offloaded)
    under_way = rounds[start : end + 1]
    moving = [r for r in under_way if "adaptive" not in r.captured]
    ours = (median_of(before, "adaptive"), median_of(after, "adaptive"))
    theirs = (median_of(before, "all"), median_of(after, "all"))
    median = ours[0] or ours[1]
    cost = 1 - ours[0] / ours[1] if ours[0] and ours[1] else None
    drift = theirs[0] / theirs[1] if theirs[0] and theirs[1] else None
    return {
        "length": here.length,
        **{name: value for name, value in asdict(move).items() if name != "step"},
        "offloaded": here.offloaded,
        "steps": len(under_way),
        "extra_s": None if median is None else sum(r.seconds["adaptive"] - median for r in moving),
        "slowest_step": None if median is None or not moving else max(r.seconds["adaptive"] for r in moving) / median,
        "slowest_step_of_all": None if theirs[0] is None else max(r.seconds["all"] for r in under_way) / theirs[0],
        "tokens_per_s": [None if s is None else requests / s for s in ours],
        "cost": cost,
        "cost_against_all": None if cost is None or drift is None else 1 - (1 - cost) / drift,
    }


def summary_of(
    rounds: Sequence[Round], points: Sequence[dict[str, Any]], crossings: Sequence[dict[str, Any]], layers: int
) -> dict[str, Any]:
    """The worst of everything, beside what is wanted."""
    costs = [c["cost_against_all"] for c in crossings if c["cost_against_all"] is not None]
    slowest = [c["slowest_step"] for c in crossings if c["slowest_step"] is not None]
    ratios = [p["ratio"] for p in points if p["ratio"] is not None]
    captures = [r.seconds["adaptive"] for r in rounds if "adaptive" in r.captured and not r.settling]
    worst = max(costs, default=None), max(slowest, default=None), min(ratios, default=None)
    return {
        "crossings": len(crossings),
        "least_ratio": worst[2],
        "median_ratio": statistics.median(ratios) if ratios else None,
        "points_at_target": sum(ratio >= LEAST_RATIO for ratio in ratios),
        "points": len(ratios),
        "ratio_met": worst[2] is not None and worst[2] >= LEAST_RATIO,
        "most_cost": worst[0],
        "median_cost": statistics.median(costs) if costs else None,
        "most_cost_allowed": 2 / layers,
        "cost_met": worst[0] is not None and worst[0] < 2 / layers,
        "slowest_moving_step": worst[1],
        "slowest_quiet_step": max((p["slowest_step"] for p in points), default=None),
        "moving_step_met": worst[1] is not None and worst[1] <= MOST_STEP,
        "captures_outside_of_jumps_s": captures,
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show(report: dict[str, Any]) -> None:
    console = Console(width=110)
    console.print(point_table(report), crossing_table(report))
    for line in sentences(report["summary"]):
        console.print(line, highlight=False)


def point_table(report: dict[str, Any]) -> Table:
    what = f"{report['model']}, {report['requests']} request(s), budget {report['budget']:,}"
    title = f"{what}: tokens a second ({report['clock']} clock)"
    table = Table(title=title)
    for column in ("length", "layers offloaded", *SYSTEMS, "adaptive / better", "steps"):
        table.add_column(column, justify="right")
    for point in report["points"]:
        speeds = [number(point["tokens_per_s"][name], ".1f") for name in SYSTEMS]
        ratio = number(point["ratio"], ".3f")
        table.add_row(f"{point['length']:,}", str(point["offloaded"]), *speeds, ratio, str(point["steps"]))
    return table


def crossing_table(report: dict[str, Any]) -> Table:
    table = Table(title="moves: one layer each, from the device to the host")
    for column in (
        "length",
        "layer",
        "MB",
        "steps",
        "host s",
        "extra s",
        "slowest step / median",
        "tok/s",
        "cost",
        "against all",
    ):
        table.add_column(column, justify="right")
    for c in report["crossings"]:
        speeds = " to ".join(number(speed, ".1f") for speed in c["tokens_per_s"])
        table.add_row(
            f"{c['length']:,}",
            f"{c['layer']}{'' if c['to_host'] else ' back'}",
            f"{c['bytes'] / 1e6:.1f}",
            str(c["steps"]),
            f"{c['stall_s']:.4f}",
            number(c["extra_s"], ".4f"),
            number(c["slowest_step"], ".2f"),
            speeds,
            number(c["cost"], ".1%"),
            number(c["cost_against_all"], ".1%"),
        )
    return table


def sentences(summary: dict[str, Any]) -> list[str]:
    verdict = {True: "met", False: "not met"}
    found = [
        f"adaptive against the better of the two: least {number(summary['least_ratio'], '.3f')}, median "
        f"{number(summary['median_ratio'], '.3f')}; {summary['points_at_target']} of {summary['points']} points at "
        f"{LEAST_RATIO} or more ({verdict[summary['ratio_met']]})",
        f"cost of one crossing, against what `all` did meanwhile: at most {number(summary['most_cost'], '.1%')}, median "
        f"{number(summary['median_cost'], '.1%')}; allowed 2/L = {summary['most_cost_allowed']:.1%} "
        f"({verdict[summary['cost_met']]})",
        f"slowest step beside a move: {number(summary['slowest_moving_step'], '.2f')} medians, slowest with none: "
        f"{number(summary['slowest_quiet_step'], '.2f')}; allowed {MOST_STEP:g} ({verdict[summary['moving_step_met']]})",
    ]
    if summary["captures_outside_of_jumps_s"]:
        times = ", ".join(f"{seconds:.2f} s" for seconds in summary["captures_outside_of_jumps_s"])
        found.append(f"steps of adaptive that recorded a CUDA graph, not counted above: {times}")
    return found
