"""Decode tokens that read all that is stored: in place, or in tiles that are streamed in."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.engine.lanes import RunningLane
from specontext.engine.layer_call import LayerCall
from specontext.kernels.paged_attention import paged_attention
from specontext.kernels.softmax import with_sinks
from specontext.kernels.spans import vectors_in
from specontext.kernels.sparse_attention import merge_partials, sparse_attention
from specontext.kv.staging import Staging
from specontext.kv.transfers import Transfers


def attend_to_all(transfers: Transfers, lane: RunningLane, call: LayerCall, staging: Staging | None, tile: int) -> Tensor:
    """Attention [R, Hq, D] of a lane's decode tokens.

    Args:
        staging: earlier tokens of layers that are out of reach.
        tile: stored tokens that are read at once where they are in reach.
    """
    in_reach = transfers.in_reach(call.layer)
    output, lse = _in_place(transfers, lane, call, tile) if in_reach else _in_tiles(transfers, lane, call, staging)
    return with_sinks(output, lse, call.softmax)


def _in_place(transfers: Transfers, lane: RunningLane, call: LayerCall, tile: int) -> tuple[Tensor, Tensor]:
    """Attention to the pages of a layer, and its log-sum-exp."""
    home = transfers.home(call.layer)
    pages, lengths = home.table_of(call.layer).index_select(0, lane.decode.seats), lane.decode.lengths
    return paged_attention(call.query, home.by_page(call.layer), pages, lengths, call.scale, call.softmax.cap, tile=tile)


def _in_tiles(transfers: Transfers, lane: RunningLane, call: LayerCall, staging: Staging | None) -> tuple[Tensor, Tensor]:
    """The same of a layer whose tokens are streamed in. New tokens are on their way to the host, and stand beside the tiles."""
    query, scale, cap, device = call.query, call.scale, call.softmax.cap, call.key.device
    stored = transfers.as_stored(call.layer, call.key, call.value)
    vectors = vectors_in(transfers.tiers.tokens.rows, call.key.shape[-1])  # of a latent one, which is both
    own = torch.stack(stored[:vectors], dim=2).flatten(0, 1)
    place = torch.arange(len(own), device=device).view(*call.key.shape[:2], 1)
    parts = [sparse_attention(query, own, place, scale, cap)]
    assert staging is not None and lane.read is not None
    for tile in staging.tiles(call.layer, lane.read):
        absent = torch.arange(tile.start, tile.stop, device=device) >= lane.decode.positions[:, None]
        rows = tile.rows().masked_fill(absent[:, None], -1)  # [R, Hkv, T]
        parts.append(sparse_attention(query, tile.buffer, rows, scale, cap))
    outputs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
    return merge_partials(outputs, lses), torch.logsumexp(lses, dim=0)
