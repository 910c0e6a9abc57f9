"""Decode tokens that choose alike, in a step that runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from specontext.kv.layout import PlacedSelection, Reader
from specontext.kv.staging import DenseRead
from specontext.retrieval.selector import AheadSelector, LaneTokens, LayerSelector, Selector


@dataclass(eq=False)
class RunningLane:
    """Decode tokens of a step whose requests choose in the same way: ahead of it, in each layer, or not at all.

    Attributes:
        ahead, in_layer: the selector, where it is of this kind; both are None where everything is read.
        part: where they stand in the batch.
        read: the stored tokens, where everything is read; else None.
        reading: what they read, of the last selection.
        rows: arena rows of `reading` for every layer, integers [L, R, Hkv, B], where they are made for all layers at once.
        seconds: that choosing took, all layers.
        chosen: what a layer has chosen whose KV others read too.
    """

    selector: Selector
    ahead: AheadSelector | None
    in_layer: LayerSelector | None
    reader: Reader
    decode: LaneTokens
    part: slice
    read: DenseRead | None
    reading: PlacedSelection | None = None
    rows: Tensor | None = None
    seconds: float = 0.0
    chosen: dict[int, PlacedSelection] = field(default_factory=dict)
