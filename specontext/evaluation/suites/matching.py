"""RULER's metrics: which reference answers stand in an output (https://arxiv.org/abs/2404.06654)."""

from __future__ import annotations

import re
from collections.abc import Sequence


def match_all(output: str, references: Sequence[str]) -> float:
    """Share of the references that the output contains, in any case of letters."""
    return sum(reference.lower() in output.lower() for reference in references) / len(references)


def match_part(output: str, references: Sequence[str]) -> float:
    """1 when the output contains any of the references, else 0."""
    return float(any(reference.lower() in output.lower() for reference in references))


def match_words(output: str, references: Sequence[str]) -> float:
    """Share of the references that are whole words or numbers of the output: `ant` does not stand in `lantern`."""
    words = set(re.findall(r"[a-z]+|\d+", output.lower()))
    return sum(reference.lower() in words for reference in references) / len(references)
