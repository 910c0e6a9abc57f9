"""What a load test sends: random prompts of one length, and when each is sent."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specontext.errors import SpeContextError


class WorkloadError(SpeContextError, ValueError):
    """A load that cannot be made."""


@dataclass(frozen=True)
class Workload:
    """Prompts of `input_len` random tokens, each to be continued by `output_len` tokens.

    Attributes:
        request_rate: requests a second, arriving at random; infinity sends all at once.
        max_concurrency: requests under way at a time; None is no limit.
    """

    num_prompts: int = 100
    input_len: int = 128
    output_len: int = 128
    request_rate: float = math.inf
    max_concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise WorkloadError(f"max_concurrency must be at least 1, got {self.max_concurrency}")
        if not self.request_rate > 0:
            raise WorkloadError(f"request_rate must be above 0, got {self.request_rate}: inf sends all at once")

    def prompts(self, tokenizer: Any, *, more: int = 0) -> list[list[int]]:
        """Token ids of ordinary tokens; `more` further prompts are for warming up, since one that is sent twice is known."""
        rng = random.Random(self.seed)
        added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}  # the model may have no rows for these
        ordinary: Sequence[int] = [token for token in range(len(tokenizer)) if token not in added]
        return [rng.choices(ordinary, k=self.input_len) for _ in range(self.num_prompts + more)]

    def arrivals(self) -> list[float]:
        """Seconds after the start at which each request is sent: a Poisson process."""
        if math.isinf(self.request_rate):
            return [0.0] * self.num_prompts
        rng, now, times = random.Random(self.seed + 1), 0.0, []
        for _ in range(self.num_prompts):
            times.append(now)
            now += rng.expovariate(self.request_rate)
        return times
