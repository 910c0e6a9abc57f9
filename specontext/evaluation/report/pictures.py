"""The pictures of a report: accuracy against tokens read, shares against length or budget, differences, amounts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specontext.evaluation.report.methods import Mark
from specontext.evaluation.report.numbers import interval, percent, points, whole
from specontext.evaluation.report.results import Row, ordered, unique
from specontext.evaluation.report.statements import difference, verdict_of
from specontext.evaluation.report.svg import GLYPH, Canvas, Scale, around
from specontext.retrieval.registry import FULL, bound_of

LEFT, RIGHT, TOP, BOTTOM = 48.0, 78.0, 24.0, 42.0
ROW = 19.0
Marks = dict[str, Mark]


def pareto_front(means: Sequence[Row]) -> list[Row]:
    """Cells that no other cell beats: none reads as little or less and scores higher. The bounds are no methods to use."""
    cells = [mean for mean in means if None not in (mean["score"], mean["tokens_read"]) and bound_of(mean["method"]) is None]
    front: list[Row] = []
    for cell in sorted(cells, key=lambda cell: (cell["tokens_read"], -cell["score"])):
        if not front or cell["score"] > front[-1]["score"]:
            front.append(cell)
    return front


def accuracy_against_reading(suite: str, means: Sequence[Row], marks: Marks, length: float | None) -> str | None:
    """The Pareto picture of one length; None where no cell has both numbers."""
    cells = [m for m in means if m["length"] == length and m["tokens_read"] and m["score"] is not None]
    if not cells:
        return None
    where = f"contexts of {whole(length)} tokens" if length else "contexts of the data's own length"
    front = pareto_front(cells)
    canvas = Canvas(
        f"{suite}: accuracy against tokens read, {where}",
        f"Each mark is a method at one budget. Up is more accurate, left is less to read. The dashed line joins the cells that "
        f"no other beats: {'; '.join(_named(cell) for cell in front)}. All numbers stand in the table of means.",
    )
    reads = [cell["tokens_read"] for cell in cells]
    x = Scale(min(reads) / 1.15, max(reads) * 1.15, LEFT, canvas.width - RIGHT, log=True)
    edges = [cell[name] for cell in cells for name in ("score", "ci_low", "ci_high") if cell[name] is not None]
    y = _upwards(canvas, around(edges, least=0.0, most=1.0))
    canvas.axes(
        x, y, x_label="tokens read by a KV head in each step", y_label=f"{suite}: score, {where}", x_text=whole, y_text=_share
    )
    steps: list[tuple[float, float]] = []
    for cell in front:
        if steps:
            steps.append((x(cell["tokens_read"]), steps[-1][1]))
        steps.append((x(cell["tokens_read"]), y(cell["score"])))
    canvas.line(steps, "front", dashed=True)
    _curves(canvas, cells, marks, x, y, "tokens_read", "score")
    return canvas.svg


def shares(suite: str, cells: Sequence[Row], marks: Marks, what: str, *, label: str, along: str, where: str) -> str | None:
    """A share of the rows against `along`, "length" or "budget"; None where there is nothing to show."""
    cells = [cell for cell in cells if cell[what] is not None and cell[along]]
    if not cells:
        return None
    axis = {"length": "context length in tokens", "budget": "budget in tokens"}[along]
    ends = "; ".join(
        f"{m} {percent(next(c[what] for c in reversed(cells) if c['method'] == m))}" for m in unique(c["method"] for c in cells)
    )
    canvas = Canvas(
        f"{suite}: {label} against {axis}, {where}", f"One line a method. At the right end: {ends}. The tables hold all numbers."
    )
    values = [cell[along] for cell in cells]
    x = Scale(min(values) / 1.1, max(values) * 1.1, LEFT, canvas.width - RIGHT, log=True)
    y = _upwards(canvas, around([cell[what] for cell in cells], least=0.0, most=1.0))
    canvas.axes(x, y, x_label=axis, y_label=f"{suite}: {label}, {where}", x_text=whole, y_text=_share)
    _curves(canvas, cells, marks, x, y, along, what)
    return canvas.svg


def forest(pairs: Sequence[Row], marks: Marks, *, title: str) -> str | None:
    """Paired differences with their intervals, a row each; None where no interval is known."""
    pairs = [pair for pair in pairs if verdict_of(pair) is not None]
    if not pairs:
        return None
    main = pairs[0]["method"]
    counts = {verdict: sum(verdict_of(pair) == verdict for pair in pairs) for verdict in ("below", "around", "above")}
    canvas = Canvas(
        title,
        f"{main} minus another method in percentage points, with 95 % intervals. Left of zero {main} is worse. "
        f"Whole interval below zero: {counts['below']}; around zero: {counts['around']}; above zero: {counts['above']}. "
        "The table has all numbers.",
        height=TOP + BOTTOM + ROW * len(pairs) + 8,
    )
    edges = [0.0, *(pair[end] for pair in pairs for end in ("ci_low", "ci_high", "difference"))]
    labels = [f"{pair['other']}" + (f" · {whole(pair['budget'])}" if pair["budget"] else "") for pair in pairs]
    left = min(170.0, 14 + GLYPH * max(map(len, labels)))
    x = Scale(*around(edges), left, canvas.width - 88)
    bottom = canvas.height - BOTTOM
    for value in x.ticks(5):
        canvas.line([(x(value), TOP), (x(value), bottom)], "zero" if value == 0 else "grid")
        canvas.text(x(value), bottom + 15, _points(value), anchor="middle", kind="tick")
    canvas.text(
        (x.start + x.stop) / 2,
        bottom + 32,
        f"← {main} worse · percentage points · better →",
        anchor="middle",
        kind="axis",
    )
    canvas.text(4, 11, title, kind="axis")
    words = {"below": "worse", "around": "", "above": "better"}
    for number, (pair, label) in enumerate(zip(pairs, labels, strict=True)):
        verdict = verdict_of(pair) or "around"
        y = TOP + ROW * (number + 0.75)
        canvas.text(left - 8, y + 4, label, anchor="end", kind="label")
        canvas.line([(x(pair["ci_low"]), y), (x(pair["ci_high"]), y)], f"whisker {verdict}")
        mark = Mark(verdict, marks[pair["other"]].shape if pair["other"] in marks else "circle", False)
        canvas.mark(x(pair["difference"]), y, mark, f"{main} minus {label}: {difference(pair)}")
        canvas.text(canvas.width - 82, y + 4, f"{points(pair['difference'])} {words[verdict]}", kind=f"label {verdict}")
    return canvas.svg


def amounts(cells: Sequence[Row], marks: Marks, what: str, *, label: str, shown: Callable[[float | None], str]) -> str | None:
    """A number of the rows, a row for each method and budget; None where there is none."""
    cells = [cell for cell in cells if cell[what] is not None]
    if not cells:
        return None
    names = [cell["method"] + (f" · {whole(cell['budget'])}" if cell["budget"] else "") for cell in cells]
    listed = "; ".join(f"{name} {shown(cell[what])}" for name, cell in zip(names, cells, strict=True))
    canvas = Canvas(label, f"{listed}.", height=TOP + BOTTOM + ROW * len(cells))
    left = min(190.0, 14 + GLYPH * max(map(len, names)))
    x = Scale(0.0, max(cell[what] for cell in cells) * 1.05 or 1.0, left, canvas.width - 70)
    bottom = canvas.height - BOTTOM
    for value in x.ticks(4):
        canvas.line([(x(value), TOP), (x(value), bottom)], "grid")
        canvas.text(x(value), bottom + 15, shown(value), anchor="middle", kind="tick")
    canvas.text(4, 11, label, kind="axis")
    for number, (cell, name) in enumerate(zip(cells, names, strict=True)):
        y = TOP + ROW * (number + 0.6)
        canvas.text(left - 8, y + 4, name, anchor="end", kind="label")
        canvas.line([(x(0.0), y), (x(cell[what]), y)], f"whisker {marks[cell['method']].colour}")
        canvas.mark(x(cell[what]), y, marks[cell["method"]], f"{name}: {shown(cell[what])}")
        canvas.text(x(cell[what]) + 9, y + 4, shown(cell[what]), kind="label")
    return canvas.svg


def _curves(canvas: Canvas, cells: Sequence[Row], marks: Marks, x: Scale, y: Scale, across: str, up: str) -> None:
    """A line and marks for each method, and its name at the end."""
    wanted = []
    for method in unique(cell["method"] for cell in cells):
        own = sorted((cell for cell in cells if cell["method"] == method), key=lambda cell: cell[across])
        places = [(x(cell[across]), y(cell[up])) for cell in own]
        mark = marks[method]
        canvas.line(places, mark.colour, dashed=mark.dashed)
        for cell, (left, top) in zip(own, places, strict=True):
            if up == "score" and None not in (cell["ci_low"], cell["ci_high"]):
                canvas.line([(left, y(cell["ci_low"])), (left, y(cell["ci_high"]))], f"whisker thin {mark.colour}")
            canvas.mark(left, top, mark, _tip(cell, up))
        wanted.append((*places[-1], method, mark.colour))
    canvas.labels(wanted, top=TOP, bottom=canvas.height - BOTTOM)


def _tip(cell: Row, what: str) -> str:
    said = [_named(cell)]
    if cell["length"]:
        said.append(f"{whole(cell['length'])} tokens of context")
    said.append(f"{what.replace('_', ' ')} {percent(cell[what])}")
    if what == "score":
        said[-1] += f" {interval(cell['ci_low'], cell['ci_high'])}".removesuffix(" –")
        said.append(f"{whole(cell['tokens_read'])} tokens read")
    return ", ".join(said)


def _named(cell: Row) -> str:
    return (
        cell["method"] if cell["method"] == FULL or not cell["budget"] else f"{cell['method']} at budget {whole(cell['budget'])}"
    )


def _upwards(canvas: Canvas, ends: tuple[float, float]) -> Scale:
    return Scale(*ends, canvas.height - BOTTOM, TOP)


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"


def _points(value: float) -> str:
    return f"{100 * value:+.3g}".replace("-", "−").replace("+0", "0") if value else "0"


def axis_of(cells: Sequence[Row]) -> str:
    """What a share is drawn against: the length where there are several, else the budget."""
    return "length" if len([length for length in ordered(cell["length"] for cell in cells) if length]) > 1 else "budget"
