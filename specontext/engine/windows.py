"""A step in layers with a window: decode tokens and prompt chunks store KV in the rings of their seats, and read them there.

Nothing is chosen in these layers, and nothing of them is moved: whatever method a request has, its window is read as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Batch, Segment
from specontext.engine.layer_call import LayerCall
from specontext.kernels.softmax import with_sinks
from specontext.kernels.sparse_attention import sparse_attention
from specontext.kernels.tables import NewTokens
from specontext.kernels.window_attention import window_attention
from specontext.kv.rings import Rings
from specontext.layer_sizes import Window


class WindowedStep:
    """Attention of one packed batch in the layers with a window."""

    def __init__(self, batch: Batch, rings: Rings) -> None:
        self._batch, self._rings = batch, rings
        if batch.prefills:
            rings.begin_keeping(batch.prefills)
        self._rows: dict[Window, Tensor] = {}  # that decode tokens read, the same in all layers with this window
        # Of layers whose KV others read too, by layer and seat: keys and values that a chunk reads, and the first one's position.
        self._chunks: dict[tuple[int, int], tuple[Tensor, Tensor, int]] = {}

    def attend(self, window: Window, call: LayerCall) -> Tensor:
        """See `LayerAttention.attend_window`."""
        batch, decodes = self._batch, slice(self._batch.num_decodes)
        if not batch.prefills:
            return self._decode(window, call)
        output = torch.empty_like(call.query)
        if batch.num_decodes:
            output[decodes] = self._decode(window, call.of(decodes))
        for segment in batch.prefills:
            part = slice(segment.offset, segment.offset + segment.length)
            output[part] = self._attend_chunk(segment, window, call.of(part))
        return output

    def _attend_chunk(self, segment: Segment, window: Window, call: LayerCall) -> Tensor:
        layer, rings = call.layer, self._rings
        if call.stored:  # the ring has lost what was before the chunk
            keys, values, first = self._chunks[layer, segment.seat]
            return window_attention(call.query, keys, values, call.scale, window, first, call.softmax)
        before, first = rings.before(layer, segment.seat, segment.start)
        old = before.to(call.key.dtype).unbind(2)
        keys, values = (torch.cat(both) for both in zip(old, (call.key, call.value), strict=True))
        output = window_attention(call.query, keys, values, call.scale, window, first, call.softmax)
        if layer in rings.read_again:
            self._chunks[layer, segment.seat] = keys, values, first
        rings.keep(layer, segment, call.key, call.value)
        rings.append_chunk(layer, segment.seat, segment.start, call.key, call.value)
        return output

    def _decode(self, window: Window, call: LayerCall) -> Tensor:
        batch, decodes = self._batch, slice(self._batch.num_decodes)
        seats, positions = batch.seats[decodes], batch.positions[decodes]
        if not call.stored:
            self._rings.append(call.layer, NewTokens(seats, positions, batch.lengths[decodes], call.key, call.value))
        if window not in self._rows:
            self._rows[window] = self._rings.rows_of(window, seats, positions)
        rows, softmax = self._rings.rows(call.layer), call.softmax
        return with_sinks(*sparse_attention(call.query, rows, self._rows[window], call.scale, softmax.cap), softmax)
