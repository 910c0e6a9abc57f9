"""The suites by name; each makes its tasks, from a path or a Hub name where the suite has data.

A task may say more than `EvalTask` asks of it: `default_lengths`, the lengths that are run where none are asked for (without
it, its problems have lengths of their own), and `unfit(text)`, why it is left out for a model unless asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from specontext.evaluation.suites.documents import documents
from specontext.evaluation.suites.example import EvalTask, Example, TextTools
from specontext.evaluation.suites.longbench import longbench, longbench_e
from specontext.evaluation.suites.longwriter import longwriter
from specontext.evaluation.suites.math import DATA_SETS, math_suite
from specontext.evaluation.suites.reasoning import reasoning
from specontext.evaluation.suites.ruler import ruler

__all__ = ["SUITES", "EvalTask", "Example", "TextTools"]

SUITES: dict[str, Callable[..., list[EvalTask]]] = {
    "ruler": ruler,
    "reasoning": reasoning,
    "longbench": longbench,
    "longbench-e": longbench_e,
    "longwriter": longwriter,
    "documents": documents,
    **{name: partial(math_suite, name) for name in DATA_SETS},
}
