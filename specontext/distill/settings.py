"""Settings of one training of a retrieval head."""

from __future__ import annotations

import math
from dataclasses import dataclass

from specontext.config import check_seed
from specontext.distill.attention import Pool
from specontext.errors import ConfigError

OBJECTIVES = ("attention", "output", "both")
PRECISIONS = ("float32", "bfloat16")
POOLS = ("max", "mean")


@dataclass(frozen=True)
class DistillConfig:
    """Settings of one training.

    Attributes:
        steps: of the first phase; `loop_steps` of a second one follow, with the selection in the loop.
        objective: 'attention' (what the target attends to, and what reading it does to its output), 'output' (EAGLE-3's: soft
            cross-entropy of a whole draft against the target's next-token distribution) or 'both', the sum.
        lengths: lengths of sequences in tokens with their shares; each step draws one.
        tokens_per_step: tokens of one step; a sequence longer than that is a step of its own.
        accumulate: batches whose gradients make one step.
        precision: number format of matrix products, target and head alike; parameters and losses stay in float32.
        queries: query positions sampled of each sequence for the attention objective; `random_share` of them anywhere, the
            others where an answer is wanted.
        sink, recent: first and last tokens that every selection keeps (the query's own among the recent ones).
        teacher_pool: pooling of the target's probabilities over the query heads of a KV head. 'max' keeps what any of them needs,
            'mean' is the average that attention recall measures.
        teacher_layers: pooling of these over the layers and KV heads that read a group.
        student_pool: pooling of the head's weights in the loss; selection always takes the maximum.
        attention_weight, effect_weight: weights of the KL to the target's attention, and to the effects that single tokens have
            on its output; see `specontext.distill.effects`. A weight of 0 saves the work.
        replay_queries: how many of a sequence's queries run through the target again, for effects and in the loop.
        loop_learning_rate: highest rate of the second phase.
        loop_weight: weight of the loop's loss in that phase, beside the others.
        loop_temperature: width in nats of a selection's soft edge, through which the gradient goes.
        loop_budgets: budgets in the loop, as shares of the length, with their own shares of the batches.
        unroll_steps, unroll_decay: steps of EAGLE-3's training-time test, and the weight of each against the one before.
        output_weight: weight of the output loss where both are trained.
        measure_every, save_every: steps between held-out measurements, and between checkpoints.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int
    objective: str = "attention"
    lengths: tuple[tuple[int, float], ...] = ((2048, 1.0),)
    tokens_per_step: int = 16384
    accumulate: int = 1
    precision: str = "float32"
    learning_rate: float = 4e-3
    warmup: int = 30
    weight_decay: float = 0.01
    clip: float = 1.0
    queries: int = 256
    random_share: float = 0.1
    sink: int = 4
    recent: int = 16
    teacher_pool: Pool = "max"
    teacher_layers: Pool = "max"
    student_pool: Pool = "max"
    attention_weight: float = 0.5
    effect_weight: float = 1.0
    replay_queries: int = 64
    loop_steps: int = 0
    loop_learning_rate: float = 5e-4
    loop_weight: float = 5.0
    loop_temperature: float = 1.0
    loop_budgets: tuple[tuple[float, float], ...] = ((1 / 32, 0.3), (1 / 16, 0.3), (1 / 8, 0.25), (1 / 4, 0.15))
    unroll_steps: int = 7
    unroll_decay: float = 0.8
    output_weight: float = 1.0
    measure_every: int = 100
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        pools = [(name, getattr(self, name), POOLS) for name in ("teacher_pool", "teacher_layers", "student_pool")]
        for name, value, known in (("objective", self.objective, OBJECTIVES), ("precision", self.precision, PRECISIONS), *pools):
            if value not in known:
                raise ConfigError(f"unknown {name} '{value}': choose one of {', '.join(known)}")
        whole = (
            "steps",
            "tokens_per_step",
            "accumulate",
            "queries",
            "replay_queries",
            "unroll_steps",
            "measure_every",
            "save_every",
        )
        for name in whole:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "loop_learning_rate", "loop_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("attention_weight", "effect_weight", "loop_weight", "output_weight", "loop_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        check_seed(self.seed)
        if any(length <= self.sink + self.recent for length, _ in self.lengths):
            raise ConfigError(f"sequences must be longer than sink + recent = {self.sink + self.recent} tokens")
        if self.attends and not self.attention_weight + self.effect_weight:
            raise ConfigError("attention_weight and effect_weight are both 0: raise one of them, or choose the objective output")
        if self.loop_steps and not self.attends:
            raise ConfigError(
                "the loop teaches a head to select: choose the objective attention or both, or leave out loop_steps"
            )
        if self.loop_steps and not self.loop_weight:
            raise ConfigError("loop_weight is 0: raise it, or leave out loop_steps")

    @property
    def attends(self) -> bool:
        return self.objective in ("attention", "both")

    @property
    def speaks(self) -> bool:
        return self.objective in ("output", "both")

    @property
    def total_steps(self) -> int:
        return self.steps + self.loop_steps
