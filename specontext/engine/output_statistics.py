"""The statistics of one output, and what they are for several outputs together: every field says how it is merged.

What they mean stands in docs/architecture.md. Users get them by name, as JSON (`as_dict`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from specontext.engine.residency import Move

# (value, decode steps) of every output that has a value, at least one, in order
Values = Sequence[tuple[Any, int]]
Rule = Mapping[str, Callable[[Values], Any]]


def _rule(merge: Callable[[Values], Any]) -> Rule:
    return {"merge": merge}


def _mean(values: Values) -> float | None:
    steps = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / steps if steps else None


def _means(values: Values) -> list[float | None]:
    weights = [weight for _, weight in values]
    return [_mean(list(zip(each, weights, strict=True))) for each in zip(*(value for value, _ in values), strict=True)]


def _moves(values: Values) -> tuple[Move, ...]:
    seen = dict.fromkeys(move for moves, _ in values for move in moves)
    return tuple(sorted(seen, key=lambda move: move.step))


SAME = _rule(lambda values: values[0][0])  # all outputs of a request have the same
SUM = _rule(lambda values: sum(value for value, _ in values))
EARLIEST = _rule(lambda values: min(value for value, _ in values))  # the first output that got so far
LAST = _rule(lambda values: values[-1][0])
MOST = _rule(lambda values: max(value for value, _ in values))
MEAN = _rule(_mean)  # over the decode steps of all outputs
MEANS = _rule(_means)  # the same, number by number
WORDS = _rule(lambda values: ", ".join(dict.fromkeys(word for words, _ in values for word in words.split(", "))))  # of any, once
UNION = _rule(_moves)  # what any output has seen


@dataclass(frozen=True)
class DecodeStatistics:
    """What was counted in the decode steps of an output, means over them; None where there is nothing to measure."""

    decode_steps: int
    tokens_read_per_step: float | None
    selection_bytes_per_step: float | None
    bytes_loaded_per_step: float | None
    bytes_full_per_step: float | None
    overlap: float | None
    hit_rate: float | None
    attention_recall: float | None
    attention_recall_by_layer: list[float] | None
    selection_s_per_step: float | None


@dataclass(frozen=True)
class OutputStatistics:
    """One output's, or several outputs' together; in the order in which users see them."""

    weights: str | None = field(metadata=SAME)
    method: str = field(metadata=SAME)
    budget: int | None = field(metadata=SAME)
    sink: int = field(metadata=SAME)
    recent: int = field(metadata=SAME)
    slots: int | None = field(metadata=SAME)
    offload_layers: int | None = field(metadata=SAME)
    offloaded_layers: int = field(metadata=MOST)
    moves: tuple[Move, ...] = field(metadata=UNION)
    preemptions: int = field(metadata=SUM)
    granularity: str = field(metadata=SAME)
    head_rope_theta: float | None = field(metadata=SAME)
    head_yarn_factor: float | None = field(metadata=SAME)
    prompt_tokens: int = field(metadata=MOST)
    cached_tokens: int = field(metadata=MOST)
    completion_tokens: int = field(metadata=SUM)
    decode_steps: int = field(metadata=SUM)
    tokens_read_per_step: float | None = field(metadata=MEAN)
    selection_bytes_per_step: float | None = field(metadata=MEAN)
    bytes_loaded_per_step: float | None = field(metadata=MEAN)
    bytes_full_per_step: float | None = field(metadata=MEAN)
    overlap: float | None = field(metadata=MEAN)
    hit_rate: float | None = field(metadata=MEAN)
    attention_recall: float | None = field(metadata=MEAN)
    attention_recall_by_layer: list[float] | None = field(metadata=MEANS)
    selection_s_per_step: float | None = field(metadata=MEAN)
    captured_steps: int = field(metadata=SUM)
    queue_s: float | None = field(metadata=EARLIEST)
    ttft_s: float = field(metadata=EARLIEST)
    tpot_s: float | None = field(metadata=MEAN)
    step_s: float | None = field(metadata=LAST)
    expected_step_s: float | None = field(metadata=LAST)
    waited_for: str | None = field(default=None, metadata=WORDS)

    def as_dict(self) -> dict[str, object]:
        """By name, of values that JSON has."""
        return asdict(self) | {"moves": [move.as_dict() for move in self.moves]}


def merge(outputs: Sequence[OutputStatistics]) -> OutputStatistics:
    """One set of statistics for several outputs, at least one, which have the same settings."""
    if len(outputs) == 1:
        return outputs[0]
    merged: dict[str, Any] = {}
    for one in fields(OutputStatistics):
        values = [(value, output.decode_steps) for output in outputs if (value := getattr(output, one.name)) is not None]
        merged[one.name] = one.metadata["merge"](values) if values else None
    return OutputStatistics(**merged)
