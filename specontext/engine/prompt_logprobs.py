"""Log-probabilities of prompt tokens, taken from the steps that compute the prompts.

The logits of a packed position say how likely the token after it was. They are made for a few positions at a time, and only the
values that were asked for reach the host.

Shapes use E positions, H hidden size, V vocabulary size, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.core import Request
from specontext.engine.sampler import logprob_table, ranked_logprobs, rows_at_once
from specontext.engine.scheduler import Schedule
from specontext.kernels.dispatch import upload


@dataclass(frozen=True)
class PromptRows:
    """Packed positions of one step whose logits are about prompt tokens that have no log-probability yet.

    Attributes:
        counts: requests, and how many of the positions are theirs, in order.
        positions: int64 [E] on the device, indices into the packed batch.
        targets: int64 [E] on the device, the prompt token after each position.
    """

    counts: tuple[tuple[Request, int], ...]
    positions: Tensor
    targets: Tensor


def prompt_rows(schedule: Schedule) -> PromptRows | None:
    """What a step, before it is counted as computed, can say about prompts; None if nobody asked, as in decode steps.

    Every position counts once: a request that is computed again has the entries of its first time.
    """
    batch = schedule.batch
    counts: list[tuple[Request, int]] = []
    positions: list[int] = []
    targets: list[int] = []
    for request, segment in zip(schedule.requests[batch.num_decodes :], batch.prefills, strict=True):
        if request.prompt_logprobs is None:
            continue
        end = request.prompt_length - 1  # the logits of the last position are about the output
        first, stop = len(request.prompt_logprobs) - 1, min(segment.start + segment.length, end)
        assert segment.start <= first or first == end, "positions before this chunk were skipped"
        if first < stop:
            counts.append((request, stop - first))
            positions += range(segment.offset + first - segment.start, segment.offset + stop - segment.start)
            targets += request.token_ids[first + 1 : stop + 1]
    if not counts:
        return None
    packed = upload([positions, targets], torch.int64, batch.token_ids.device)
    return PromptRows(tuple(counts), packed[0], packed[1])


def add_prompt_logprobs(rows: PromptRows, states: Tensor, logits_of: Callable[[Tensor], Tensor], vocab_size: int) -> None:
    """Append to the requests' `prompt_logprobs` what a step has found.

    Args:
        states: [E, H], what enters the output layer at the positions.
        logits_of: the output layer, [e, H] to [e, V].
    """
    width = min(max(request.params.prompt_logprobs or 0 for request, _ in rows.counts), vocab_size)
    size = rows_at_once(vocab_size)
    parts = [
        ranked_logprobs(logits_of(some).float(), tokens, width)
        for some, tokens in zip(states.split(size), rows.targets.split(size), strict=True)
    ]
    ids, values = (torch.cat(part).tolist() for part in zip(*parts, strict=True))  # each [E, 1 + K]
    row = 0
    for request, count in rows.counts:
        assert request.prompt_logprobs is not None
        top = min(request.params.prompt_logprobs or 0, vocab_size)
        request.prompt_logprobs += [logprob_table(ids[i], values[i], top) for i in range(row, row + count)]
        row += count
