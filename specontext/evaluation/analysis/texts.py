"""The sequences that are measured: filled to their length, with queries where the context is long.

A recall at some length means little if half of its queries stand near the beginning. So queries are the wanted positions of the
last quarter of a sequence, and sequences that fill less than 7/8 of the length are not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.distill.data import DataError, Source

FILLED = 7 / 8
LAST_PART = 1 / 4
DRAWS = 24  # sequences that are looked at for each one that is wanted


@dataclass(frozen=True)
class Sample:
    """One sequence without padding.

    Attributes:
        ids: int64 [1, S].
        wanted: bool [1, S], where queries may be taken; at least one position and the next one are.
    """

    ids: Tensor
    wanted: Tensor

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def draw_samples(source: Source, length: int, count: int) -> list[Sample]:
    """The first `count` sequences of a source that are long enough and have queries near their end.

    Raises:
        DataError: the source has none among all that were looked at.
    """
    samples: list[Sample] = []
    longest = 0
    for step in range(DRAWS * count):
        drawn = source.draw(step, length, 1)
        tokens = int(drawn.lengths[0])
        longest = max(longest, tokens)
        if tokens < FILLED * length:
            continue
        wanted = drawn.wanted[:, :tokens] & (torch.arange(tokens) >= tokens - int(tokens * LAST_PART))
        if (wanted[:, 1:] & wanted[:, :-1]).any():
            samples.append(Sample(drawn.ids[:, :tokens], wanted))
        if len(samples) == count:
            return samples
    if samples:
        return samples
    if longest < FILLED * length:
        raise DataError(
            f"the texts hold no sequences of {length} tokens, the longest has {longest}: lower the length or give longer texts"
        )
    raise DataError(f"the last quarter of {length} tokens never holds an answer of two tokens: give texts that end with answers")


def fitting_length(source: Source, lengths: Sequence[int]) -> int:
    """The first of `lengths` that the texts can fill.

    Raises:
        DataError: none; the message is that of the last one.
    """
    for length in lengths:
        try:
            draw_samples(source, length, 1)
        except DataError:
            if length == lengths[-1]:
                raise
        else:
            return length
    raise AssertionError("there is always a last length")
