"""Usage of a request: its tokens, and the statistics of its outputs as one."""

from __future__ import annotations

from collections.abc import Sequence

from specontext.engine.output_statistics import OutputStatistics, merge
from specontext.server.protocol.common import CompletionTokensDetails, PromptTokensDetails, Usage

_IN_USAGE = ("prompt_tokens", "completion_tokens", "cached_tokens")  # itself


def make_usage(
    prompt_tokens: int,
    completion_tokens: int,
    stats: Sequence[OutputStatistics | None],
    *,
    n: int,
    reasoning_tokens: int | None = None,
) -> Usage:
    """Usage of all outputs of a request together; a prompt counts once however many outputs it has.

    Args:
        stats: of every output, `n` for each prompt, one prompt after another; None where nothing was made.
        reasoning_tokens: of the completion tokens, where thinking is told from answers.
    """
    cached = [one.cached_tokens if one is not None else None for one in stats]
    of_prompts = [[c for c in cached[begin : begin + n] if c is not None] for begin in range(0, len(cached), n)]
    known = [min(outputs) for outputs in of_prompts if outputs]  # outputs after the first one find their own prompt
    made = [one for one in stats if one is not None]
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(known)) if known else None,
        completion_tokens_details=None
        if reasoning_tokens is None
        else CompletionTokensDetails(reasoning_tokens=reasoning_tokens),
        specontext={name: value for name, value in merge(made).as_dict().items() if name not in _IN_USAGE} if made else None,
    )
