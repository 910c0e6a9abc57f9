"""The suite `reasoning`: long outputs in which every step looks something up that stands far back.

`score` is the final answer's. Beside it: `steps`, the share of steps that are right; `exact` where an output is compared as
a whole.
"""

from __future__ import annotations

from specontext.evaluation.suites.example import EvalTask
from specontext.evaluation.suites.generated import SuiteError
from specontext.evaluation.suites.reasoning_ledger import LedgerTask
from specontext.evaluation.suites.reasoning_pointers import PointersTask
from specontext.evaluation.suites.reasoning_program import ProgramTask
from specontext.evaluation.suites.trained import TrainedTask
from specontext.tasks import PROGRAM

SUITE = "reasoning"
DEFAULT_LENGTHS = (1024, 2048)


def reasoning(data: str | None = None) -> list[EvalTask]:
    """All tasks of the suite.

    Raises:
        SuiteError: `data` was given: this suite needs none.
    """
    if data is not None:
        raise SuiteError(f"the suite '{SUITE}' is generated and takes no data: leave --data out")
    return [
        TrainedTask(SUITE, PROGRAM, True, DEFAULT_LENGTHS),
        ProgramTask(SUITE, "program"),
        PointersTask(SUITE, "pointers"),
        LedgerTask(SUITE, "ledger"),
    ]
