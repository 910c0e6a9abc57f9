"""A step in layers with a window: decode tokens and prompt chunks store KV in the rings of their seats, and read them there.

Nothing is chosen in these layers, and nothing of them is moved: whatever method a request has, its window is read as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Batch
from specontext.kernels.softmax import Softmax, with_sinks
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

    def attend(
        self, layer: int, window: Window, query: Tensor, key: Tensor, value: Tensor, scale: float, softmax: Softmax, stored: bool
    ) -> Tensor:
        """See `LayerAttention.attend_window`."""
        batch, decodes = self._batch, self._batch.num_decodes
        if not batch.prefills:
            return self._decode(layer, window, query, key, value, scale, softmax, stored)
        output = torch.empty_like(query)
        if decodes:
            q, k, v = (x[:decodes] for x in (query, key, value))
            output[:decodes] = self._decode(layer, window, q, k, v, scale, softmax, stored)
        for segment in batch.prefills:
            part = slice(segment.offset, segment.offset + segment.length)
            if stored:  # the ring has lost what was before the chunk
                keys, values, first = self._chunks[layer, segment.seat]
                output[part] = window_attention(query[part], keys, values, scale, window, first, softmax)
                continue
            before, first = self._rings.before(layer, segment.seat, segment.start)
            old = before.to(key.dtype).unbind(2)
            keys, values = (torch.cat(both) for both in zip(old, (key[part], value[part]), strict=True))
            output[part] = window_attention(query[part], keys, values, scale, window, first, softmax)
            if layer in self._rings.read_again:
                self._chunks[layer, segment.seat] = keys, values, first
            self._rings.keep(layer, segment, key[part], value[part])
            self._rings.append_chunk(layer, segment.seat, segment.start, key[part], value[part])
        return output

    def _decode(
        self, layer: int, window: Window, query: Tensor, key: Tensor, value: Tensor, scale: float, softmax: Softmax, stored: bool
    ) -> Tensor:
        batch, decodes = self._batch, self._batch.num_decodes
        seats, positions = batch.seats[:decodes], batch.positions[:decodes]
        if not stored:
            self._rings.append(layer, NewTokens(seats, positions, batch.lengths[:decodes], key, value))
        if window not in self._rows:
            self._rows[window] = self._rings.rows_of(window, seats, positions)
        return with_sinks(*sparse_attention(query, self._rings.rows(layer), self._rows[window], scale, softmax.cap), softmax)
