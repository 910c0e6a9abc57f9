"""Methods as an evaluation is asked for them: `quest`, or `speculative@DIR` for one with a retrieval head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specontext.evaluation.samples import EvaluationError
from specontext.retrieval.registry import CHOICES, FULL, needs_head


@dataclass(frozen=True)
class Competitor:
    """A method of an evaluation.

    Attributes:
        label: how it was asked for and is reported.
        method: its name in the engine.
        head: its own retrieval head; None is the evaluation's.
    """

    label: str
    method: str
    head: str | None = None

    @classmethod
    def parse(cls, text: str) -> Competitor:
        """`METHOD` or `METHOD@HEAD`.

        Raises:
            EvaluationError: no such method, or a head for one that has none.
        """
        method, at, head = text.partition("@")
        if method not in CHOICES:
            raise EvaluationError(f"unknown method '{method}': choose among {', '.join(CHOICES)}")
        if at and not needs_head(method):
            raise EvaluationError(f"'{text}' names a retrieval head and {method} has none: write {method}")
        if at and not head:
            raise EvaluationError(f"'{text}' names no retrieval head after the @: write {method}@DIR, or {method}")
        return cls(text, method, head or None)

    def budgets(self, asked: Sequence[int]) -> tuple[int | None, ...]:
        """Those of the asked budgets that are different ones for this method."""
        return (None,) if self.method == FULL else tuple(dict.fromkeys(asked))


Choice = tuple[Competitor, int | None]  # and the budget


def parse_competitors(texts: Sequence[str]) -> tuple[Competitor, ...]:
    """All methods, each once, in order.

    Raises:
        EvaluationError: none, or one that is not there.
    """
    if not texts:
        raise EvaluationError("no method was named: give some with --methods, such as full,speculative")
    return tuple(Competitor.parse(text) for text in dict.fromkeys(texts))
