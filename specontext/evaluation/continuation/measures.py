"""What two continuations of one prompt have in common, and how much one repeats itself. All on tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

NGRAM = 4


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Tokens before the first that is another one, or before the end of the shorter."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(tokens), len(others)))


def edit_distance(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Levenshtein's: the least number of tokens to replace, insert or delete."""
    target, places = np.asarray(others, dtype=np.int64), np.arange(len(others) + 1)
    row = places.copy()
    for number, token in enumerate(tokens, 1):
        new = np.empty_like(row)
        new[0] = number
        new[1:] = np.minimum(row[1:] + 1, row[:-1] + (target != token))
        row = np.minimum.accumulate(new - places) + places  # insertions, from any earlier place
    return int(row[-1])


def similarity(tokens: Sequence[int], others: Sequence[int]) -> float:
    """1 for the same continuation, 0 for one of which nothing stays: 1 - edit distance / length of the longer."""
    longest = max(len(tokens), len(others))
    return 1 - edit_distance(tokens, others) / longest if longest else 1.0


def common_ngrams(tokens: Sequence[int], others: Sequence[int], n: int = NGRAM) -> float:
    """F1 of the n-grams, each as often as it occurs, wherever they stand; 1 where neither has any."""
    mine, theirs = Counter(ngrams(tokens, n)), Counter(ngrams(others, n))
    total = mine.total() + theirs.total()
    return 2 * (mine & theirs).total() / total if total else 1.0


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams over all n-grams; 1 where there are none."""
    found = ngrams(tokens, n)
    return len(set(found)) / len(found) if found else 1.0


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams that were there before."""
    return 1 - distinct(tokens, n)


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))
