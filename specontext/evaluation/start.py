"""Run an evaluation, whatever its suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specontext.evaluation.continuation.rows import SUITE as CONTINUATION
from specontext.evaluation.continuation.run import run_continuation
from specontext.evaluation.fidelity.rows import SUITE as FIDELITY
from specontext.evaluation.fidelity.run import run_fidelity
from specontext.evaluation.run import Begin, run_evaluation
from specontext.evaluation.settings import EvaluationSettings

# Suites in which full attention is what all others are compared with, rather than one of those that answer.
RELATIVE: dict[str, Callable[..., dict[str, Any]]] = {FIDELITY: run_fidelity, CONTINUATION: run_continuation}


def evaluate(settings: EvaluationSettings, begin: Begin) -> dict[str, Any]:
    """Run what is not there yet, and return the content of `results.json`.

    Raises:
        EvaluationError, SpeContextError: as of `run_evaluation`.
    """
    return RELATIVE.get(settings.suites[0], run_evaluation)(settings, begin)
