"""Where something is missing, in words: a reason is said once, and places that are alike stand together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specontext.evaluation.report.numbers import anything, listed
from specontext.evaluation.report.results import unique

Place = dict[str, tuple[str, ...]]
_BARE = ("suite", "task", "method", "text")  # whose values say what they are


def places_by_reason(notes: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The places of each reason, `why`, in the order in which they came."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for note in notes:
        found.setdefault(str(note["why"]), []).append({name: value for name, value in note.items() if name != "why"})
    return {why: in_words(records) for why, records in found.items()}


def in_words(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Records such as {task, length, method}, as few as say the same."""
    places: list[Place] = [
        {name: (anything(value),) for name, value in each.items() if value not in (None, "")} for each in records
    ]
    for name in reversed(unique(name for place in places for name in place)):
        places = _together(places, name)
    return unique(_said(place) for place in places)


def _place(record: Mapping[str, Any]) -> Place:
    return {name: (anything(value),) for name, value in record.items() if value not in (None, "")}


def _together(places: Sequence[Place], name: str) -> list[Place]:
    """Places that differ in this one thing as one."""
    found: dict[Any, Place] = {}
    for place in places:
        rest = (name in place, tuple((key, values) for key, values in place.items() if key != name))
        known = found.setdefault(rest, place)
        if known is not place and name in place:
            found[rest] = {key: tuple(unique((*v, *place[name]))) if key == name else v for key, v in known.items()}
    return list(found.values())


def _said(place: Place) -> str:
    said: list[str] = []
    for name, values in place.items():
        words = listed(list(values))
        if name == "task" and said and "suite" in place:
            said[-1] += f" {words}"
        elif name == "length":
            said.append(f"{words} tokens")
        else:
            said.append(words if name in _BARE else f"{name.replace('_', ' ')} {words}")
    return ", ".join(said)
