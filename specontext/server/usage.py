"""Usage of a request: its tokens, and the statistics of its outputs as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specontext.server.protocol.common import CompletionTokensDetails, PromptTokensDetails, Usage

Stats = dict[str, Any]

_IN_USAGE = ("prompt_tokens", "completion_tokens", "cached_tokens")
_EARLIEST = ("queue_s", "ttft_s")
_MEANS = ("overlap", "hit_rate", "attention_recall", "tpot_s")  # and all that is counted for a step


def make_usage(
    prompt_tokens: int, completion_tokens: int, stats: Sequence[Stats], *, n: int, reasoning_tokens: int | None = None
) -> Usage:
    """Usage of all outputs of a request together; a prompt counts once however many outputs it has.

    Args:
        stats: of every output, `n` for each prompt, one prompt after another; empty where nothing was made.
        reasoning_tokens: of the completion tokens, where thinking is told from answers.
    """
    cached = [s.get("cached_tokens") for s in stats]
    of_prompts = [[c for c in cached[begin : begin + n] if c is not None] for begin in range(0, len(cached), n)]
    known = [min(outputs) for outputs in of_prompts if outputs]  # outputs after the first one find their own prompt
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(known)) if known else None,
        completion_tokens_details=None
        if reasoning_tokens is None
        else CompletionTokensDetails(reasoning_tokens=reasoning_tokens),
        specontext=merge([s for s in stats if s]) or None,
    )


def merge(stats: Sequence[Stats]) -> Stats:
    """One set of statistics for several outputs, which have the same settings.

    Steps and preemptions are added up, times are those of the first output to get so far, moves are what any output has seen,
    `offloaded_layers` is the most that any had, and what is measured in steps is averaged over the steps of all outputs.
    """
    if not stats:
        return {}
    return {name: _merged(name, stats) for name in stats[0] if name not in _IN_USAGE}


def _merged(name: str, stats: Sequence[Stats]) -> Any:
    values = [(s[name], s.get("decode_steps") or 0) for s in stats if s.get(name) is not None]
    if len(stats) == 1 or not values:
        return stats[0][name]
    if name == "moves":
        moves = {tuple(move.values()): move for seen, _ in values for move in seen}
        return sorted(moves.values(), key=lambda move: move["step"])
    if name == "preemptions" or name.endswith("_steps"):
        return sum(value for value, _ in values)
    if name in _EARLIEST:
        return min(value for value, _ in values)
    if name == "offloaded_layers":
        return max(value for value, _ in values)
    if name == "attention_recall_by_layer":
        steps = sum(weight for _, weight in values)
        return [
            sum(share * weight for share, (_, weight) in zip(shares, values, strict=True)) / steps
            for shares in zip(*(v for v, _ in values), strict=True)
        ]
    if name in _MEANS or name.endswith("_per_step"):
        steps = sum(weight for _, weight in values)
        return sum(value * weight for value, weight in values) / steps if steps else None
    return values[0][0]
