"""One output while it is made, as users see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from specontext.core import Request
from specontext.engine.constraint import Constraint
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.output_statistics import OutputStatistics


@dataclass(eq=False)
class Generation:
    """A request and what users see of it.

    Attributes:
        forced: the output's first tokens, instead of sampled ones.
        on_logits: sees the logits [V] before each token of the output; they are valid until the next step.
        end_token_ids: tokens that end the output.
        constraint: the grammar that the output follows.
        stats: filled when the request ends.
    """

    request: Request
    detokenizer: Detokenizer
    forced: Sequence[int] = ()
    on_logits: Callable[[Tensor], None] | None = None
    end_token_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    stats: OutputStatistics | None = None
    moves_before: int = 0

    @property
    def follows_the_device(self) -> bool:
        """Whether the request's next step takes the token that the device has chosen, and nobody looks into the step."""
        looks = self.request.prompt_logprobs is not None and not self.request.decoding
        return not self.forced and self.on_logits is None and not looks

    @property
    def finished(self) -> bool:
        return self.request.finish_reason is not None
