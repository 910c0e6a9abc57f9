"""Budgets as an evaluation is asked for them: KV entries, or a share of the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from specontext.evaluation.samples import EvaluationError

AskedBudget = int | Fraction


def parse_budgets(text: str) -> tuple[AskedBudget, ...]:
    """`256,1/8`.

    Raises:
        EvaluationError: something else.
    """
    return tuple(_parse(part.strip()) for part in text.split(","))


def _parse(text: str) -> AskedBudget:
    try:
        return Fraction(text) if "/" in text else int(text)
    except (ValueError, ZeroDivisionError) as error:
        raise EvaluationError(
            f"--budgets takes KV entries, or shares of the length, with commas, such as 256,1/8; got '{text}'"
        ) from error


def check_budgets(budgets: Sequence[AskedBudget], least: int) -> None:
    """Raises EvaluationError for a budget that makes no sense at any length.

    Args:
        least: smallest budget, sink + recent + 1.
    """
    for budget in budgets:
        if isinstance(budget, Fraction):
            if not 0 < budget < 1:
                raise EvaluationError(f"a budget of {budget} is no share of the length: give one between 0 and 1, such as 1/8")
        elif budget < least:
            raise EvaluationError(f"a budget must be at least {least} (sink + recent + 1), got {budget}")


def entries(budget: AskedBudget, length: int | None) -> int:
    """KV entries of a budget at a length.

    Raises:
        EvaluationError: a share of no length.
    """
    if not isinstance(budget, Fraction):
        return budget
    if length is None:
        raise EvaluationError(f"a budget of {budget} needs a length to be a share of: give --lengths, or budgets in KV entries")
    return int(length * budget)


def largest(budgets: Sequence[AskedBudget], lengths: Sequence[int] | None, longest: int, least: int) -> int:
    """The greatest number of KV entries that budgets come to.

    Args:
        lengths: that are asked for; None where each task has its own.
        longest: context of the model, beyond which no length is run.
    """
    most = min(longest, max(lengths)) if lengths else longest
    return max(least, *(entries(budget, most) for budget in budgets))
