"""Usage of a request: its tokens, and the statistics of its outputs as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specontext.server.protocol.common import PromptTokensDetails, Usage

Stats = dict[str, Any]

_MEANS = ("overlap", "hit_rate", "attention_recall", "tpot_s")  # and all that is counted for a step
_IN_USAGE = ("prompt_tokens", "completion_tokens", "cached_tokens")


def make_usage(prompt_tokens: int, completion_tokens: int, stats: Sequence[Stats]) -> Usage:
    """Usage of all outputs of a request together; a prompt counts once however many outputs it has."""
    cached = [s["cached_tokens"] for s in stats if s.get("cached_tokens") is not None]
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached)) if cached else None,
        specontext=merge(stats) or None,
    )


def merge(stats: Sequence[Stats]) -> Stats:
    """One set of statistics for several outputs: steps are added up, what is measured in steps is averaged over all of them."""
    if not stats:
        return {}
    merged = {name: value for name, value in stats[0].items() if name not in _IN_USAGE}
    if len(stats) == 1:
        return merged
    for name in merged:
        values = [(s[name], s.get("decode_steps") or 0) for s in stats if s.get(name) is not None]
        if name == "decode_steps":
            merged[name] = sum(value for value, _ in values)
        elif name == "ttft_s":
            merged[name] = min((value for value, _ in values), default=None)
        elif name.endswith("_per_step") or name in _MEANS:
            steps = sum(weight for _, weight in values)
            merged[name] = sum(value * weight for value, weight in values) / steps if steps else None
    return merged
