"""What an evaluation is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specontext.config import check_seed
from specontext.evaluation.budgets import AskedBudget, check_budgets
from specontext.evaluation.competitors import parse_competitors
from specontext.evaluation.continuation.rows import SUITE as CONTINUATION
from specontext.evaluation.fidelity.rows import SUITE as FIDELITY
from specontext.evaluation.samples import EvaluationError
from specontext.evaluation.suites import SUITES
from specontext.evaluation.suites.documents import SUITE as DOCUMENTS
from specontext.evaluation.suites.longwriter_judge import Judge

ALONE = (FIDELITY, CONTINUATION)  # suites that are compared with full attention rather than with answers
KV_FORMATS = ("kv_cache_dtype", "host_kv_dtype")
READING = (*ALONE, DOCUMENTS)  # suites of the user's own texts


@dataclass(frozen=True)
class EvaluationSettings:
    """Model, problems and methods.

    Attributes:
        out: directory of results and samples.
        methods: names of the engine's methods, also as METHOD@HEAD.
        budgets: of all methods but `full`, in KV entries or as shares of the length; None is what the retrieval head recommends.
        lengths: in tokens; None is what each task has by default.
        limit: problems of each task and length at most.
        tasks: names; None is all that fit the model.
        data: path or Hub name, for a suite that has data.
        texts: of the suites that need some, as `specontext.distill.data.open_sources` takes them.
        compared: last tokens of each text that `fidelity` compares at.
        new_tokens: that `continuation` writes at most.
        judge: of what was written, for a suite whose answers can be judged.
        retrieval_head: of the methods that name none of their own; as `LLM` takes it.
        offload_layers: last layers whose KV lives in host memory, -1 all.
        engine: further keyword options of `LLM`.
        skip_unsupported: leave methods out that cannot work on the model, instead of refusing to run.
        command: recorded in the results.

    Raises:
        EvaluationError: values that make no sense.
    """

    model: str
    suites: tuple[str, ...]
    out: Path
    methods: tuple[str, ...] = ("full", "speculative")
    budgets: tuple[AskedBudget, ...] | None = None
    lengths: tuple[int, ...] | None = None
    limit: int = 20
    tasks: tuple[str, ...] | None = None
    data: str | None = None
    texts: tuple[str, ...] = ()
    compared: int = 128
    new_tokens: int = 2048
    judge: Judge | None = None
    seed: int = 0
    retrieval_head: str | None = "auto"
    sink: int = 4
    recent: int = 16
    offload_layers: int = 0
    engine: dict[str, Any] = field(default_factory=dict)
    skip_unsupported: bool = False
    command: str | None = None

    def __post_init__(self) -> None:
        if not self.suites:
            raise EvaluationError(f"no suite was named: choose among {', '.join((*SUITES, *ALONE))}")
        if unknown := [name for name in self.suites if name not in SUITES and name not in ALONE]:
            raise EvaluationError(f"unknown suite '{unknown[0]}': choose among {', '.join((*SUITES, *ALONE))}")
        if len(self.suites) > 1 and (alone := [name for name in self.suites if name in ALONE]):
            raise EvaluationError(f"{alone[0]} runs by itself: run it into the same directory if you like")
        for option in ("tasks", "data", "judge") if self.suites[0] in ALONE else ():
            if getattr(self, option) is not None:
                raise EvaluationError(
                    f"the suite {self.suites[0]} has texts only, and nothing would look at {option}: leave it out"
                )
        if self.tasks == ():
            raise EvaluationError("no task was named: give at least one, or leave the option out")
        if bool(self.texts) != any(name in READING for name in self.suites):
            named = next((name for name in self.suites if name in READING), None)
            asked = f"the suite {named} needs texts" if named else f"only the suites {', '.join(READING)} take texts"
            raise EvaluationError(f"{asked}: --suite {named or FIDELITY} --text FILE")
        parse_competitors(self.methods)
        check_seed(self.seed)
        if self.budgets is not None:
            if not self.budgets:
                raise EvaluationError("no budget was named: give at least one, or leave the option out")
            check_budgets(self.budgets, self.least_budget)
        for name, values, low in (
            ("length", self.lengths, 1),
            ("limit", (self.limit,), 1),
            ("number of compared tokens", (self.compared,), 1),
            ("number of new tokens", (self.new_tokens,), 1),
        ):
            if values is not None and not values:
                raise EvaluationError(f"no {name} was named: give at least one, or leave the option out")
            if wrong := [value for value in values or () if value < low]:
                raise EvaluationError(f"a {name} must be at least {low}, got {wrong[0]}")
        if self.data is not None and len(self.suites) > 1:
            raise EvaluationError(
                "data belongs to one suite: run suites with data one by one, into the same directory if you like"
            )

    @property
    def least_budget(self) -> int:
        """Sinks, recent window and one entry more."""
        return self.sink + self.recent + 1

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for all samples of a directory."""
        same = ("dtype", "max_model_len", "head_rope_theta", "head_yarn_factor", "load_format", "quantization", "revision")
        own = {"model": self.model, "head": self.retrieval_head, "seed": self.seed, "sink": self.sink, "recent": self.recent}
        own |= {} if self.judge is None else {"judge": self.judge.model}
        own |= {name: self.engine[name] for name in KV_FORMATS if self.engine.get(name, "auto") != "auto"}
        return own | {"offload_layers": self.offload_layers} | {name: self.engine[name] for name in same if name in self.engine}
