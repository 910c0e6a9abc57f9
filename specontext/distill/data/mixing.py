"""Several sources as one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from specontext.distill.data.source import DataError, Sequences, Source, check_size

Sizes = Callable[[int], tuple[int, int]]  # length and rows that a step is drawn with


class Weighted:
    """Every sequence comes from one of `sources`, as likely as its weight says, drawn by (seed, step)."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        self.sources, self.weights, self.seed = tuple(sources), tuple(weights), seed

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        check_size(step, length, rows)
        rng = random.Random(f"mixing/{self.seed}/{step}")
        chosen = torch.tensor(rng.choices(range(len(self.sources)), self.weights, k=rows))
        ids = torch.zeros((rows, length), dtype=torch.int64)
        lengths = torch.zeros(rows, dtype=torch.int64)
        wanted = torch.zeros((rows, length), dtype=torch.bool)
        for number, source in enumerate(self.sources):
            mine = (chosen == number).nonzero().flatten()
            if len(mine):
                drawn = source.draw(step, length, len(mine))
                ids[mine], lengths[mine], wanted[mine] = drawn.ids, drawn.lengths, drawn.wanted
        return Sequences(ids, lengths, wanted)


class Mixed:
    """Whole steps of `on_policy` sequences, in a share of all steps, among steps of `ordinary` ones.

    The steps of each kind are as evenly spread as they can be, and each source sees its own count of steps 0, 1, 2, ...: so
    blocks of an `OnPolicy` source, generated together, are used completely.

    Args:
        share: of 0 (only ordinary) to 1 (only on-policy).

    Raises:
        DataError: a share outside 0 .. 1.
    """

    def __init__(self, on_policy: Source, ordinary: Source, share: float) -> None:
        if not 0 <= share <= 1:
            raise DataError(f"the share of on-policy sequences must be in 0 .. 1, got {share}")
        self.on_policy, self.ordinary, self.share = on_policy, ordinary, Fraction(str(share))

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        check_size(step, length, rows)
        before, after = int(step * self.share), int((step + 1) * self.share)
        if after > before:
            return self.on_policy.draw(before, length, rows)
        return self.ordinary.draw(step - before, length, rows)


def sizes_of_share(sizes: Sizes, share: float) -> Sizes:
    """From the sizes of a training's steps those of the steps that `Mixed` draws from its on-policy source, above share 0."""
    exact = Fraction(str(share))
    return lambda step: sizes(math.ceil((step + 1) / exact) - 1)
