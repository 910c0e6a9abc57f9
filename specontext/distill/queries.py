"""Which query positions of a sequence are looked at, and which tokens compete for them."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.errors import ConfigError


def sample_rows(wanted: Tensor, queries: int, random_share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw query positions of each sequence: wanted ones, and a few anywhere up to the last of these.

    Args:
        wanted: bool [N, S], the positions whose next token the model has to say.
        queries: Q, positions drawn of each sequence.

    Returns:
        rows int64 [N, Q], and bool [N, Q], False for filling where a sequence has fewer.
    """
    rows = torch.zeros(len(wanted), queries, dtype=torch.int64)
    real = torch.zeros(len(wanted), queries, dtype=torch.bool)
    others = round(queries * random_share)
    for n, mask in enumerate(wanted.cpu()):
        found = mask.nonzero().flatten()
        if len(found):
            picked = found[torch.randperm(len(found), generator=generator)[: queries - others]]
            anywhere = torch.randint(int(found[-1]) + 1, (others,), generator=generator)
            rows[n, : len(picked) + others] = torch.cat((picked, anywhere))
            real[n, : len(picked) + others] = True
    return rows.to(wanted.device), real.to(wanted.device)


def candidates(rows: Tensor, length: int, sink: int, recent: int) -> tuple[Tensor, Tensor]:
    """The tokens that compete for queries `rows` [N, Q], and those that are always kept: bool [N, 1, Q, length] each.

    Raises:
        ConfigError: no recent tokens; the query's own is one, and has no key yet when it is processed.
    """
    if recent < 1:
        raise ConfigError(f"recent must be at least 1, got {recent}: a query's own token is always read")
    token, row = torch.arange(length, device=rows.device), rows[:, None, :, None]
    far = (token >= sink) & (token <= row - recent)
    return far, (token <= row) & ~far


def scored(budget: int, sink: int, recent: int) -> int:
    """How many tokens of a budget are chosen by their scores.

    Raises:
        ConfigError: none are.
    """
    if budget <= sink + recent:
        raise ConfigError(f"a budget of {budget} has no room beside {sink} sinks and {recent} recent tokens: raise the budget")
    return budget - sink - recent
