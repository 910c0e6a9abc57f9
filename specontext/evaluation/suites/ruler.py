"""The suite `ruler`: the thirteen tasks of RULER (https://arxiv.org/abs/2404.06654) at any length, for any tokenizer.

Needles, keys, templates, answer prefixes and metrics are RULER's. Its essays and the passages and questions of its two
question-answering tasks are replaced by drawn text, so nothing has to be downloaded and nothing can be known by heart.
A model whose vocabulary is that of the generated tasks (`nano`) gets the kinds that it is trained on, in their words.
"""

from __future__ import annotations

from specontext.evaluation.suites.example import EvalTask
from specontext.evaluation.suites.generated import SuiteError
from specontext.evaluation.suites.ruler_documents import DocumentsTask
from specontext.evaluation.suites.ruler_needles import NeedleTask
from specontext.evaluation.suites.ruler_tracking import ChainTask
from specontext.evaluation.suites.ruler_words import CommonWordsTask, FrequentWordsTask
from specontext.evaluation.suites.trained import TrainedTask
from specontext.tasks import MULTI_KEY, MULTI_QUERY, MULTI_VALUE, SINGLE, VARIABLE_TRACKING

SUITE = "ruler"


def ruler(data: str | None = None) -> list[EvalTask]:
    """All tasks of the suite.

    Raises:
        SuiteError: `data` was given: this suite needs none.
    """
    if data is not None:
        raise SuiteError(f"the suite '{SUITE}' is generated and takes no data: leave --data out")
    return [
        *(TrainedTask(SUITE, task, True) for task in (SINGLE, MULTI_KEY, MULTI_QUERY, MULTI_VALUE, VARIABLE_TRACKING)),
        NeedleTask(SUITE, "niah_single_1", "noise"),
        NeedleTask(SUITE, "niah_single_2", "essay"),
        NeedleTask(SUITE, "niah_single_3", "essay", values="uuids"),
        NeedleTask(SUITE, "niah_multikey_1", "essay", needles=4),
        NeedleTask(SUITE, "niah_multikey_2", "needles"),
        NeedleTask(SUITE, "niah_multikey_3", "needles", keys="uuids", values="uuids"),
        NeedleTask(SUITE, "niah_multivalue", "essay", values_per_key=4),
        NeedleTask(SUITE, "niah_multiquery", "essay", needles=4, asked=4),
        ChainTask(SUITE, "vt"),
        CommonWordsTask(SUITE, "cwe"),
        FrequentWordsTask(SUITE, "fwe"),
        DocumentsTask(SUITE, "qa_1", hops=1),
        DocumentsTask(SUITE, "qa_2", hops=2),
    ]
