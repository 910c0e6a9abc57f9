"""Plots of an analysis, from its `analysis.json` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from specontext.errors import SpeContextError
from specontext.evaluation.analysis.rows import LENGTH_CURVE, Row, find, main_variant, standard_map

DPI = 110
COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart
    "speculative": "#0072B2",
    "embedding": "#56B4E9",
    "oracle": "#000000",
    "shared_oracle": "#009E73",
    "streaming": "#E69F00",
    "random": "#999999",
}
FURTHER = ("#CC79A7", "#D55E00", "#F0E442", "#8C564B")
NAMES = {"oracle": "oracle of each layer", "shared_oracle": "shared oracle", "streaming": "sinks + window", "random": "random"}
DASHES = {"head": "-", "union": "--", "batch": ":", None: "-"}


class PlotError(SpeContextError):
    """Plots that cannot be drawn; the message says what is missing."""


def check_matplotlib() -> None:
    """Raises PlotError unless plots can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotError('plots need matplotlib: pip install "specontext[plots]"') from error


def redraw(file: str | Path, folder: str | Path) -> list[Path]:
    """Draw the plots of an `analysis.json` into a folder.

    Raises:
        PlotError: matplotlib is missing, or the file is no analysis.
    """
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8"))
        return draw_plots(report, Path(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlotError(f"{file} is not an analysis that can be drawn: {error}") from error


def draw_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG for every subject that the report has rows of.

    Raises:
        PlotError: matplotlib is missing.
    """
    check_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in PLOTS.items():
        figure = draw(report["rows"], report)
        if figure is not None:
            figure.savefig(folder / name, dpi=DPI)
            drawn.append(folder / name)
    return drawn


def _figure(width: float = 8.6, height: float = 4.8) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _lines(axes: Any, lines: Iterable[tuple[str, list[Row], dict[str, Any]]], x: str) -> None:
    """Draw rows as lines over the key `x`."""
    for label, rows, style in lines:
        points = sorted((one[x], one["value"]) for one in rows)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3.5, linewidth=1.5, **style)


def _log2(axes: Any, values: Iterable[int], label: str) -> None:
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    if len(ticks) > 8:
        axes.tick_params(axis="x", labelrotation=45)
    axes.minorticks_off()
    axes.set_xlabel(label)


def _finish(figure: Any, axes: Any, label: str, title: str) -> Any:
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _speculative(rows: list[Row]) -> list[tuple[str, list[Row], dict[str, Any]]]:
    """The analysed head at every granularity and with every map; other heads at head level with their standard map."""
    main = main_variant(rows)
    lines = []
    further = iter(FURTHER)
    for variant in dict.fromkeys(one["variant"] for one in rows if one["method"] == "speculative"):
        own = find(rows, method="speculative", variant=variant)
        if variant == main:
            colour = COLOURS["speculative"]
        else:
            colour = COLOURS["embedding"] if variant.startswith("embedding:") else next(further, "#444444")
        best = standard_map(rows, variant)
        for granularity, head_map in dict.fromkeys((one["granularity"], one["map"]) for one in own):
            if variant != main and (granularity, head_map) != ("head", best):
                continue
            label = f"{variant}, {granularity} level" + (f", {head_map} map" if head_map else "")
            style = {"color": colour, "linestyle": DASHES[granularity] if head_map in (None, best) else "-."}
            lines.append((label, find(own, granularity=granularity, map=head_map), style))
    return lines


def _references(rows: list[Row]) -> list[tuple[str, list[Row], dict[str, Any]]]:
    found = []
    for method, name in NAMES.items():
        mine = [one for one in rows if one["method"] == method and one["granularity"] in ("head", None)]
        found.append((name, mine, {"color": COLOURS[method]}))
    return found


def _against_budget(what: str, label: str, title: str, *, log: bool = False) -> Callable[[list[Row], dict[str, Any]], Any]:
    def draw(rows: list[Row], report: dict[str, Any]) -> Any:
        mine = find(rows, what=what, layer=None)
        if not mine:
            return None
        figure = _figure()
        axes = figure.add_subplot()
        shown = [one for one in _references(mine) if not (what == "hit_rate" and one[0] == NAMES["oracle"])]
        _lines(axes, _speculative(mine) + shown, "budget")
        if log and all(one["value"] > 0 for one in mine):
            axes.set_yscale("log")
        _log2(axes, (one["budget"] for one in mine), "budget (KV entries, sinks and recent tokens among them)")
        return _finish(figure, axes, label, f"{report['target']}, contexts of {mine[0]['length']:,} tokens: {title}")

    return draw


def _against_length(rows: list[Row], report: dict[str, Any]) -> Any:
    mine = [one for one in rows if one["what"].split(":")[0] == LENGTH_CURVE]
    if not mine:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    states = {"no_yarn": ("head, YaRN off", "#D55E00"), "yarn": ("head, YaRN for the longest", "#CC79A7")}
    states["default"] = ("head as the engine sets it", COLOURS["speculative"])
    for share, dash in ((8, "-"), (16, "--")):
        some = [one for one in mine if one["budget"] == one["length"] // share]
        lines = [
            (f"{label}, 1/{share}", find(some, what=f"{LENGTH_CURVE}:{state}"), {"color": colour, "linestyle": dash})
            for state, (label, colour) in states.items()
        ]
        for label, found, style in _references(find(some, what=LENGTH_CURVE)):
            lines.append((f"{label}, 1/{share}", found, style | {"linestyle": dash}))
        _lines(axes, lines, "length")
    _log2(axes, (one["length"] for one in mine), "context length (tokens)")
    trained = report["head"]["trained_length"]
    axes.axvline(trained, color="#BBBBBB", linewidth=1, label=f"trained length, {trained:,}")
    return _finish(figure, axes, "attention recall", f"{report['target']}: recall at budgets of 1/8 and 1/16 of the context")


def _heat_map(rows: list[Row], report: dict[str, Any]) -> Any:
    mine = [one for one in rows if one["what"] == "recall" and one["layer"] is not None]
    if not mine:
        return None
    layers, heads = (1 + max(one[key] for one in mine) for key in ("layer", "head"))
    panels = [("retrieval head", "speculative"), ("shared oracle", "shared_oracle"), ("oracle of each layer", "oracle")]
    panels = [panel for panel in panels if find(mine, method=panel[1])]
    figure = _figure(2.2 + 2.3 * len(panels), min(9.0, 2.4 + 0.22 * layers))
    lowest = min(one["value"] for one in mine)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    image = None
    for place, (title, method) in zip(axes, panels, strict=True):
        values = [[0.0] * heads for _ in range(layers)]
        for one in find(mine, method=method):
            values[one["layer"]][one["head"]] = one["value"]
        image = place.imshow(values, aspect="auto", vmin=lowest, vmax=1.0, cmap="viridis")
        if layers * heads <= 64:
            for layer, line in enumerate(values):
                for head, value in enumerate(line):
                    dark = value < (lowest + 1) / 2
                    place.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
        place.set_title(title, fontsize=10)
        place.set_xlabel("KV head")
        place.set_xticks(_ticks(heads))
        place.set_yticks(_ticks(layers))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="attention recall")
    budget, length = mine[0]["budget"], mine[0]["length"]
    figure.suptitle(f"{report['target']}: recall at {budget:,} of {length:,} tokens", fontsize=10)
    return figure


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 16)))


def _drift(rows: list[Row], report: dict[str, Any]) -> Any:
    subjects = {
        "feature_drift": "1 - cosine of sparse and dense features",
        "feature_drift_selection": "share of scored tokens also chosen\nfrom dense features",
    }
    if not find(rows, what="feature_drift"):
        return None
    figure = _figure(8.6, 3.8)
    for place, (what, label) in zip(figure.subplots(1, 2), subjects.items(), strict=True):
        mine = find(rows, what=what)
        _lines(place, [(what, mine, {"color": COLOURS["speculative"]})], "length")
        place.set_xlabel("generated tokens")
        place.set_ylabel(label)
        place.set_ylim(bottom=0, top=1.02 if what.endswith("selection") else None)
        place.grid(alpha=0.3)
    budget = find(rows, what="feature_drift")[0]["budget"]
    figure.suptitle(f"{report['target']}: drift of features while decoding with {budget:,} KV entries", fontsize=10)
    return figure


PLOTS: dict[str, Callable[[list[Row], dict[str, Any]], Any]] = {
    "recall_vs_budget.png": _against_budget("recall", "attention recall", "share of the attention mass that is read"),
    "hit_rate_vs_budget.png": _against_budget("hit_rate", "hit rate", "share of each layer's own best tokens that are read"),
    "kl_divergence_vs_budget.png": _against_budget(
        "kl_divergence", "KL divergence (nats a token)", "distance of the output from that with everything read", log=True
    ),
    "perplexity_ratio_vs_budget.png": _against_budget(
        "perplexity_ratio", "perplexity ratio", "perplexity of the text over that with everything read", log=True
    ),
    "agreement_vs_budget.png": _against_budget("agreement", "agreement", "positions with the same most likely token"),
    "overlap_vs_budget.png": _against_budget("overlap", "overlap", "scored tokens that the step before had scored too"),
    "recall_vs_length.png": _against_length,
    "recall_heat_map.png": _heat_map,
    "feature_drift.png": _drift,
}
