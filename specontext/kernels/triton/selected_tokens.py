# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Token sets of a step in one launch: the PyTorch reference is some twenty, each of which takes as long."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.selected_tokens import ALWAYS

BLOCK = 1024  # places of a program


def selected_tokens(
    scored: Tensor, lengths: Tensor, ends: Tensor | None, *, sink: int, width: int, whole: int = 0
) -> tuple[Tensor, Tensor]:
    """See `specontext.kernels.selected_tokens.selected_tokens`. Reads 8 bytes a place that was chosen, and writes 9 a place."""
    requests, groups, count = scored.shape
    size = sink + count + width
    tokens = torch.empty((requests, groups, size), dtype=torch.int64, device=lengths.device)
    by_score = torch.empty((requests, groups, size), dtype=torch.bool, device=lengths.device)
    if tokens.numel():
        lengths = lengths.contiguous()
        _sets[(requests * groups, triton.cdiv(size, BLOCK))](
            scored,
            *scored.stride(),
            lengths,
            lengths if ends is None else ends.contiguous(),
            tokens,
            by_score.view(torch.uint8),
            groups,
            sink,
            count,
            width,
            min(whole, ALWAYS - 1),
            ENDS=ends is not None,
            WHOLE=2 if whole == ALWAYS else int(whole > 0),
            BLOCK=BLOCK,
        )
    return tokens, by_score


@triton.jit
def _sets(
    scored,
    by_request,
    by_group,
    by_place,
    lengths,
    ends,
    tokens,
    by_score,
    groups,
    sink,
    count,
    width,
    whole,
    ENDS: tl.constexpr,  # the ends of the candidates are given
    WHOLE: tl.constexpr,  # 0: what was chosen counts; 1: in contexts of more than `whole` tokens; 2: nowhere
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    request, group = row // groups, row % groups
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = sink + count + width
    length = tl.load(lengths + request)
    if ENDS:
        end = tl.load(ends + request)
    else:
        end = tl.maximum(length - width, sink)
    number = place - sink
    candidate = (number >= 0) & (number < count)
    if WHOLE > 0:
        window = tl.maximum(end - count, sink) + number
        last = tl.where(window < end, window, -1)
    if WHOLE == 2:
        chosen = last
    else:
        at = scored + request * by_request + group * by_group + number * by_place
        chosen = tl.load(at, mask=candidate, other=-1)
        if WHOLE == 1:
            chosen = tl.where(length > whole, chosen, last)
    fixed = tl.where(place < sink, place.to(tl.int64), end + (number - count))
    fixed = tl.where(fixed < length, fixed, -1)
    tl.store(tokens + row * size + place, tl.where(candidate, chosen, fixed), mask=place < size)
    tl.store(by_score + row * size + place, (candidate & (chosen >= 0)).to(tl.uint8), mask=place < size)
