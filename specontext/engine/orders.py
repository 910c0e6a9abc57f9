"""What passes between coroutines and the engine's thread: orders one way, failures and counts the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Observer(Protocol):
    """Who counts what happens; called on the engine's thread, so it must be quick."""

    def token(self, seconds: float, *, first: bool) -> None:
        """A token came `seconds` after the one before, or after the request's arrival."""

    def ended(self, seconds: float, reason: str, *, queued: float) -> None:
        """An output has ended, `seconds` after its request's arrival and `queued` seconds of them before its first seat."""


@dataclass(frozen=True)
class Order:
    """Something to be done between two steps.

    Attributes:
        refuse: called instead of `run` when the loop has ended.
    """

    run: Callable[[], None]
    refuse: Callable[[Exception], None] = lambda _: None
