"""Rows of an analysis: one measured number each, always with the same ten keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KEYS = ("what", "method", "granularity", "variant", "map", "budget", "length", "layer", "head", "value")
METHODS = ("speculative", "oracle", "shared_oracle", "streaming", "random", "full")
MAPS = ("own", "identity", "calibrated")  # in the order in which one is taken for a head's standard
LOSSES = ("kl_divergence", "perplexity_ratio", "agreement")  # of the model's output, against everything read
LENGTH_CURVE = "recall_vs_length"  # for the head with a colon and the YaRN state: no_yarn, yarn or default

Row = dict[str, Any]


def row(
    what: str,
    method: str,
    value: float,
    *,
    granularity: str | None = None,
    variant: str | None = None,
    map: str | None = None,
    budget: int | None = None,
    length: int | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> Row:
    """One number.

    Args:
        what: the quantity; `variant` and `map` say which retrieval head and head map it belongs to.
        budget: KV entries of a selection, sinks and recent tokens among them.
        length: tokens in context; of the drift rows the generated tokens at the end of a bin.
        layer, head: of the target; None is the mean over all.
    """
    assert method in METHODS and map in (None, *MAPS)
    return dict(zip(KEYS, (what, method, granularity, variant, map, budget, length, layer, head, value), strict=True))


def find(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values, in their order; None asks for rows where the key does not apply."""
    return [one for one in rows if all(one[key] == value for key, value in wanted.items())]


def value_of(rows: Iterable[Row], **wanted: Any) -> float | None:
    """The number of the first row with these values; None where there is none."""
    found = find(rows, **wanted)
    return found[0]["value"] if found else None


def main_variant(rows: Iterable[Row]) -> str | None:
    """The variant of the head that was analysed: its rows stand before those of other heads."""
    return next((one["variant"] for one in rows if one["method"] == "speculative"), None)


def standard_map(rows: Iterable[Row], variant: str | None) -> str | None:
    """The map that a head is judged by at head level: its own, else the identity, else the calibrated one."""
    maps = {one["map"] for one in find(rows, method="speculative", variant=variant, granularity="head")}
    return next((name for name in MAPS if name in maps), None)


def recall_targets(
    rows: Iterable[Row], length: int, budget: int, *, trained_length: int | None = None
) -> dict[str, float | None]:
    """How far the head is from what can be reached, at head level and with its standard map.

    Returns:
        `of_shared_oracle`, `of_oracle`: mean recall over that of one true set for all layers, and of each layer's own, at
        equal budget. `beyond_trained`: recall at twice the trained length over recall at the trained length, at budgets of 1/8
        of the lengths and with the YaRN factor that the engine sets. None where these rows were not measured.
    """
    rows = list(rows)
    variant = main_variant(rows)
    head = {"method": "speculative", "variant": variant, "granularity": "head", "map": standard_map(rows, variant)}
    at = {"what": "recall", "budget": budget, "length": length, "layer": None, "granularity": "head"}
    mine = value_of(rows, **at | head)
    found = {
        "of_shared_oracle": _ratio(mine, value_of(rows, **at | {"method": "shared_oracle"})),
        "of_oracle": _ratio(mine, value_of(rows, **at | {"method": "oracle"})),
        "beyond_trained": None,
    }
    if trained_length is not None:
        near, far = (
            value_of(rows, **head, what=f"{LENGTH_CURVE}:default", length=tokens, budget=tokens // 8)
            for tokens in (trained_length, 2 * trained_length)
        )
        found["beyond_trained"] = _ratio(far, near)
    return found


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
