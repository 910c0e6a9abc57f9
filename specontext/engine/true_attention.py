"""A layer's true attention over all that is stored: for methods that choose by it, and where recall is measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specontext.core import Segment
from specontext.engine.layer_call import LayerCall
from specontext.kernels.attention_logits import attention_logits
from specontext.kernels.quantised_rows import keys_of
from specontext.kernels.softmax import capped
from specontext.kernels.spans import read_rows
from specontext.kernels.tables import is_quantised
from specontext.kv.dense import read_tile, read_tokens, tiles_of
from specontext.kv.transfers import Transfers
from specontext.retrieval.selector import LaneTokens

# Sees a layer of a step: its number, the decode tokens, their true attention [R, Hq, S], and what each KV head reads [R, Hkv, B]
# (None for everything).
AttentionObserver = Callable[[int, LaneTokens, Tensor, Tensor | None], None]


def true_logits(transfers: Transfers, call: LayerCall, decode: LaneTokens, tile: int) -> Tensor:
    """Attention logits over the whole context of some decode tokens, whose call it is, float32 [R, Hq, S].

    Args:
        tile: tokens that are looked at at once.
    """
    parts = []
    for start, stop in tiles_of(decode.span, tile):
        buffer, rows = read_tile(transfers, call.layer, decode.seats, start, stop, decode.lengths)
        parts.append(attention_logits(call.query, buffer, rows, call.scale))
    return capped(torch.cat(parts, dim=-1), call.softmax.cap)


def covered(weights: Tensor, tokens: Tensor) -> Tensor:
    """Share of attention [R, Hq, S] that lies on tokens int64 [R, Hkv, B], -1 for none: mean over query heads, float32 [R]."""
    tokens = tokens.repeat_interleave(weights.shape[1] // tokens.shape[1], dim=1)
    return torch.where(tokens >= 0, weights.gather(-1, tokens.clamp(min=0)), 0.0).sum(-1).mean(-1)


def stored_keys(transfers: Transfers, layer: int, seat: Tensor, start: int, stop: int, like: Tensor) -> Tensor:
    """Keys of the tokens start .. stop - 1 of one request: [stop - start, Hkv, D].

    Args:
        seat: int64 [1].
        like: keys [.., D], in whose number format are those that are stored in 8 bits.
    """
    buffer, rows = read_tile(transfers, layer, seat, start, stop, torch.full_like(seat, stop))
    return keys_of(read_rows(buffer, rows[0].T), like.shape[-1], like.dtype) if is_quantised(buffer) else buffer[rows[0].T, 0]


def keys_up_to(transfers: Transfers, layer: int, segment: Segment, new: Tensor) -> Tensor:
    """Keys of a prompt up to the end of a chunk, with keys [T, Hkv, D] perhaps on their way to the host: [start + T, Hkv, D]."""
    if not segment.start:
        return new
    seat = torch.tensor([segment.seat], device=new.device)
    return torch.cat((stored_keys(transfers, layer, seat, 0, segment.start, new), new))


class View:
    """A layer as a method sees it that chooses inside it; see `LayerView`.

    Attributes:
        tokens_read: int64 [R], tokens whose keys it has looked at, None for none.
    """

    def __init__(self, transfers: Transfers, call: LayerCall, decode: LaneTokens, tile: int) -> None:
        self.query, self.scale = call.query, call.scale
        self.key, _ = transfers.as_stored(call.layer, call.key, call.value)
        self._transfers, self._call, self._decode, self._tile = transfers, call, decode, tile
        self.tokens_read: Tensor | None = None

    def logits(self) -> Tensor:
        self._read(self._decode.lengths)
        return true_logits(self._transfers, self._call, self._decode, self._tile)

    def logits_of(self, tokens: Tensor) -> Tensor:
        buffer, rows = read_tokens(self._transfers, self._call.layer, self._decode.seats, tokens)
        return capped(attention_logits(self.query, buffer, rows, self.scale), self._call.softmax.cap)

    def keys(self, row: int, start: int, stop: int) -> Tensor:
        counts = torch.zeros_like(self._decode.positions)
        counts[row] = stop - start
        self._read(counts)
        return stored_keys(self._transfers, self._call.layer, self._decode.seats[row : row + 1], start, stop, self.key)

    def _read(self, counts: Tensor) -> None:
        self.tokens_read = counts if self.tokens_read is None else self.tokens_read + counts
