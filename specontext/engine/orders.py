"""What passes between coroutines and the engine's thread: orders one way, failures and counts the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Life:
    """An output that has ended.

    Attributes:
        reason: stop, length, abort or error.
        seconds: since its request's arrival.
        queued: seconds of them before its first seat.
        prefill, decode: seconds from the first seat to the first token, and from there to the last one; None where there is none.
        prompt_tokens, tokens: of the prompt, and of the output.
    """

    reason: str
    seconds: float
    queued: float
    prefill: float | None
    decode: float | None
    prompt_tokens: int
    tokens: int


class Observer(Protocol):
    """Who counts what happens; called on the engine's thread, so it must be quick."""

    def token(self, seconds: float, *, first: bool) -> None:
        """A token came `seconds` after the one before, or after the request's arrival."""

    def step(self, tokens: int) -> None:
        """A step has computed so many tokens, of prompts and outputs."""

    def ended(self, life: Life) -> None:
        """An output has ended."""


@dataclass(frozen=True)
class Order:
    """Something to be done between two steps.

    Attributes:
        refuse: called instead of `run` when the loop has ended.
    """

    run: Callable[[], None]
    refuse: Callable[[Exception], None] = lambda _: None
