"""What is counted of a selection: how much is read, loaded, and chosen again."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation

NOTHING = torch.iinfo(torch.int32).max  # where no token was chosen, behind all that were


@operation(decided_by="tokens")
def count_selection(
    counts: Tensor,
    before: Tensor,
    seats: Tensor,
    tokens: Tensor,
    scored: Tensor,
    missing: Tensor | None,
    readers: Tensor,
    resident: Tensor,
    *,
    sink: int,
    row_bytes: int,
) -> None:
    """Add what a selection reads, and replace what the seats of its requests chose before by what they choose now.

    Where layers live is read on the device, so that a captured graph serves whichever it is.

    Args:
        counts: float64 [seats, 5], added to: entries read by all KV heads, those of them that were on the device, bytes loaded,
            the share of the chosen tokens that the seat had chosen before, and 1 where there is such a share: something was
            chosen in both steps.
        before: int32 [seats, G', W], contiguous: the tokens that a seat chose, ascending, then `NOTHING`. Replaced.
        seats: int64 [R]; rows of padding may share one, if they select nothing.
        tokens, scored: int64 and bool [R, G, B], G at most G', as in `specontext.core.Selection`. The first W that were chosen
            are kept in `before`.
        missing: bool [R, G, B], entries that are loaded by layers that are not resident; None where nothing is.
        readers: int64 [L, G'], KV heads of each layer that read a group.
        resident: bool [L], layers that load nothing.
        sink: entries before those that were chosen; the others follow these.
        row_bytes: of an entry of one KV head of one layer.
    """
    groups, width = tokens.shape[1], before.shape[-1]
    readers = readers[:, :groups]
    read = ((tokens >= 0).sum(-1) * readers.sum(0)).sum(-1)  # [R]
    loaders = (readers * ~resident[:, None]).sum(0)
    loaded = (missing.sum(-1) * loaders).sum(-1) if missing is not None else torch.zeros_like(read)
    then = before.index_select(0, seats)[:, :groups].contiguous()  # [R, G, W]
    # Chosen entries are ascending: with the sinks before them at the end, all are.
    now = torch.where(scored, tokens, NOTHING).to(torch.int32).roll(-sink, -1)[..., :width].contiguous()
    place = torch.searchsorted(then, now).clamp_(max=width - 1)
    again = ((then.gather(-1, place) == now) & (now != NOTHING)).sum((1, 2))
    total = scored.sum((1, 2))
    both = (then[..., 0] != NOTHING).any(-1) & (total > 0)
    share = torch.where(both, again.float() / total.clamp(min=1).float(), 0.0)
    counts.index_add_(0, seats, torch.stack([x.double() for x in (read, read - loaded, loaded * row_bytes, share, both)], dim=-1))
    whole = torch.nn.functional.pad(now, (0, width - now.shape[-1], 0, before.shape[1] - groups), value=NOTHING)
    before.index_copy_(0, seats, whole)
