"""The token sets of a step: sinks, what was chosen by score, and recent tokens behind each other."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation

ALWAYS = 1 << 62  # tokens: contexts of all lengths are read as far as they can be


@operation(decided_by="lengths")
def selected_tokens(
    scored: Tensor, lengths: Tensor, ends: Tensor | None, *, sink: int, width: int, whole: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens that are read, and which of them were chosen by a score.

    Args:
        scored: int64 [R, G, K], ascending candidates, then -1 where there is none.
        lengths: int64 [R], tokens in context; 0 for padding.
        ends: int64 [R], the ends of the candidates, which begin behind the sinks; None: all tokens but the last `width`.
        sink: first tokens that are read in any case.
        width: tokens from the end of the candidates on that are, too, as far as there are.
        whole: of contexts of up to so many tokens the last K candidates are read, whatever was chosen.

    Returns:
        int64 [R, G, sink + K + width], each part ascending and then padded with -1; bool of the same shape.
    """
    device, (requests, groups, count) = lengths.device, scored.shape
    length = lengths[:, None]
    end = (length - width).clamp(min=sink) if ends is None else ends[:, None]
    if whole:
        window = (end - count).clamp(min=sink) + torch.arange(count, device=device)
        last = torch.where(window < end, window, -1)[:, None].expand(-1, groups, -1)
        scored = last if whole == ALWAYS else torch.where((length <= whole)[:, None], last, scored)
    sinks, recents = torch.arange(sink, device=device).expand(requests, -1), end + torch.arange(width, device=device)
    fixed = [torch.where(tokens < length, tokens, -1)[:, None].expand(-1, groups, -1) for tokens in (sinks, recents)]
    tokens = torch.cat((fixed[0], scored, fixed[1]), dim=-1)
    by_score = torch.zeros_like(tokens, dtype=torch.bool)
    by_score[..., sink : sink + count] = scored >= 0
    return tokens, by_score
