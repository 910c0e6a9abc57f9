"""The suites by name; each makes its tasks, from a path or a Hub name where the suite has data."""

from __future__ import annotations

from collections.abc import Callable

from specontext.evaluation.suites.example import EvalTask, Example, TextTools

__all__ = ["SUITES", "EvalTask", "Example", "TextTools"]

SUITES: dict[str, Callable[..., list[EvalTask]]] = {}
