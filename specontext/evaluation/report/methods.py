"""Methods in words and in marks: what each one does, and the colour and shape it has in every picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specontext.retrieval.registry import SHAPES, bound_of, look_of, variant_of, words_of

COLOURS = 7  # --c0 .. --c6 of style.css


@dataclass(frozen=True)
class Mark:
    """How a method is drawn: a class of style.css, a shape, a whole or a dashed line."""

    colour: str
    shape: str
    dashed: bool


def marks_of(methods: Sequence[str]) -> dict[str, Mark]:
    """A mark for every method, the same in every report for those that have their own, and different from each other for all."""
    looks = {method: look_of(method) for method in methods}
    taken = set(looks.values())
    free = iter([(c, s) for s in SHAPES for c in range(COLOURS) if (c, s) not in taken] * (1 + len(methods) // 8))
    marks = {}
    for method, look in looks.items():
        colour, shape = look or next(free)
        dashed = variant_of(method) is not None or bound_of(method) == "upper"
        marks[method] = Mark("ink" if colour is None else f"c{colour}", shape, dashed)
    return marks


def describe(method: str) -> str | None:
    """What a method does, in words, its own head at the end; None for an unknown one."""
    name, _, head = method.partition("@")
    words = words_of(name)
    return f"{words}; with the retrieval head {head}" if words and head else words
