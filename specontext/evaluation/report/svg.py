"""A small plotting canvas that makes SVG text: axes, marks with tooltips, labels that do not lie on each other.

Colours are classes of style.css, so pictures follow the page into dark mode and onto paper. A mark can be reached with the
keyboard; what it says on hover is its `aria-label`, too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from specontext.evaluation.report.methods import Mark

LINE = 12  # height of a line of small text
GLYPH = 6.3  # its width, about
SIZE = 4.2


@dataclass(frozen=True)
class Scale:
    """From values to places on a canvas; `log` to base 2."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log2(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (at - low) / ((high - low) or 1.0) * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside, at most about so many."""
        if self.log:
            powers = [2.0**p for p in range(math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1)]
            return powers[:: max(1, math.ceil(len(powers) / most))] or [self.low]
        step = _round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def _round_step(step: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step or 1.0))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def around(values: Sequence[float], *, least: float | None = None, most: float | None = None) -> tuple[float, float]:
    """Ends of an axis that shows all values, with some air, not beyond `least` and `most`."""
    low, high = min(values), max(values)
    air = 0.08 * ((high - low) or abs(high) or 1.0)
    low, high = low - air, high + air
    return (low if least is None else max(low, least)), (high if most is None else min(high, most))


@dataclass
class Canvas:
    """One picture under way; `svg` is its text.

    Attributes:
        title, description: for those who do not see it.
    """

    title: str
    description: str
    width: float = 390
    height: float = 290
    parts: list[str] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], kind: str, *, dashed: bool = False) -> None:
        if len(points) > 1:
            places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            self.parts.append(f'<polyline class="line {kind}{" dashed" if dashed else ""}" points="{places}"/>')

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def mark(self, x: float, y: float, mark: Mark, says: str) -> None:
        """A point that tells what it is."""
        says = escape(says, quote=True)
        self.parts.append(
            f'<g class="mark {mark.colour}" tabindex="0" role="img" aria-label="{says}" data-tip="{says}">'
            f'<circle class="target" cx="{x:.1f}" cy="{y:.1f}" r="11"/>{_shape(mark.shape, x, y)}</g>'
        )

    def axes(self, x: Scale, y: Scale, *, x_label: str, y_label: str, x_text: object, y_text: object) -> None:
        """Grid lines with their values, and what the axes mean; `x_text` and `y_text` write a value."""
        assert callable(x_text) and callable(y_text)
        for value in y.ticks():
            self.line([(x.start, y(value)), (x.stop, y(value))], "grid")
            self.text(x.start - 5, y(value) + 4, y_text(value), anchor="end", kind="tick")
        for value in x.ticks():
            self.line([(x(value), y.start), (x(value), y.start + 4)], "grid")
            self.text(x(value), y.start + 16, x_text(value), anchor="middle", kind="tick")
        self.text((x.start + x.stop) / 2, y.start + 33, x_label, anchor="middle", kind="axis")
        self.text(4, 11, y_label, kind="axis")

    def labels(self, wanted: Sequence[tuple[float, float, str, str]], *, top: float, bottom: float) -> None:
        """Texts (x, y, text, class) beside their points, moved apart up and down where they would touch."""
        placed: list[tuple[float, float, float]] = []
        for x, y, text, kind in sorted(wanted, key=lambda label: label[1]):
            width = GLYPH * len(text)
            anchor = "start" if x + 8 + width <= self.width else "end"
            left = x + 8 if anchor == "start" else x - 8 - width
            at = _free(y + 4, left, width, placed, top, bottom)
            placed.append((at, left, width))
            self.text(left if anchor == "start" else left + width, at, text, anchor=anchor, kind=f"label {kind}")

    @property
    def svg(self) -> str:
        name = f"picture-{zlib.crc32(repr((self.title, self.parts)).encode()):08x}"
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="group" aria-labelledby="{name}-t {name}-d">'
            f'<title id="{name}-t">{escape(self.title)}</title><desc id="{name}-d">{escape(self.description)}</desc>'
            f"{''.join(self.parts)}</svg>"
        )


def _free(
    wanted: float, left: float, width: float, placed: Sequence[tuple[float, float, float]], top: float, bottom: float
) -> float:
    """The height nearest to the wanted one at which a text touches no other."""
    neighbours = [at for at, other, size in placed if other < left + width and left < other + size]
    steps = sorted(range(-40, 41), key=abs)
    heights = [wanted + step * LINE / 2 for step in steps if top <= wanted + step * LINE / 2 <= bottom]
    return next((at for at in heights if all(abs(at - other) >= LINE - 0.5 for other in neighbours)), wanted)


def _shape(shape: str, x: float, y: float) -> str:
    r = SIZE
    if shape == "circle":
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    paths = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "diamond": [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
        "up": [(0, -1.3 * r), (1.25 * r, r), (-1.25 * r, r)],
        "down": [(0, 1.3 * r), (1.25 * r, -r), (-1.25 * r, -r)],
        "star": [_ray(i * math.pi / 5, r * (0.6 if i % 2 else 1.5)) for i in range(10)],
    }
    if shape in paths:
        return f'<path class="dot" d="M{" L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in paths[shape])} Z"/>'
    ends = [(-r, 0, r, 0), (0, -r, 0, r)] if shape == "plus" else [(-r, -r, r, r), (-r, r, r, -r)]
    strokes = " ".join(f"M{x + a:.1f} {y + b:.1f} L{x + c:.1f} {y + d:.1f}" for a, b, c, d in ends)
    return f'<path class="stroke" d="{strokes}"/>'


def _ray(angle: float, length: float) -> tuple[float, float]:
    return math.sin(angle) * length, -math.cos(angle) * length
