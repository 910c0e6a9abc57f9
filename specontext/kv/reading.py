"""What attention reads of a selection, and how the heads of a seat find it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.core import LoadPlan, Selection


@dataclass(frozen=True, eq=False)
class Reader:
    """How the KV heads of a request's layers read the slot tables.

    Attributes:
        head_map: int64 [L, Hkv], retrieval group that each KV head of each layer reads.
        in_layer: each layer has a table of its own, because it selects for itself; else all read the first.
    """

    head_map: Tensor
    in_layer: bool = False

    def table(self, layer: int) -> int:
        """Number of the slot table that a layer reads."""
        return layer if self.in_layer else 0


@dataclass(eq=False)
class Reading:
    """A selection of some requests in a step, of all layers or of the one that selected.

    Attributes:
        seats: int64 [R].
        plan: where its entries are in the slots of offloaded layers; None where no layer needs one.
        rows: arena rows for every layer, integers [L, R, Hkv, B], once they are known.
    """

    seats: Tensor
    selection: Selection
    reader: Reader
    plan: LoadPlan | None = None
    rows: Tensor | None = None


def with_groups(selection: Selection, groups: int) -> Selection:
    """The selection with empty sets behind its own, so that it has as many as a table."""
    requests, own, width = selection.tokens.shape
    if own == groups:
        return selection
    tokens = selection.tokens.new_full((requests, groups, width), -1)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    tokens[:, :own], scored[:, :own] = selection.tokens, selection.scored
    return Selection(tokens, scored)
