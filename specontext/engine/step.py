"""One step of the model seen from its attention layers: store KV, select, load, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Batch, Segment, Selection
from specontext.engine.statistics import Meter
from specontext.kernels.attention_logits import attention_logits
from specontext.kernels.dense_attention import chunk_attention
from specontext.kernels.paged_attention import paged_attention
from specontext.kernels.sparse_attention import merge_partials, sparse_attention
from specontext.kv.dense import pages_in_reach, stored_tiles
from specontext.kv.tiered import TieredKV
from specontext.retrieval.selector import DecodeTokens, Selector

TILE = 1024  # tokens of one staging tile
PREFILL_TILE = 16384  # stored tokens that a prompt chunk attends to at once on a GPU, which small tiles leave idle


class Step:
    """Attention of one packed batch; it lives as long as one forward pass.

    Decode tokens read what the selector chose (everything, for a dense method); prompt chunks always attend densely.
    """

    def __init__(self, batch: Batch, kv: TieredKV, selector: Selector, meter: Meter, *, measure_recall: bool) -> None:
        self.batch, self.kv, self.selector, self.meter = batch, kv, selector, meter
        self.measure_recall = measure_recall
        decoding = slice(0, batch.num_decodes)
        seeds = torch.tensor([r.seed for r in batch.requests[decoding]], dtype=torch.int64, device=batch.seats.device)
        self.decode = DecodeTokens(batch.token_ids[decoding], batch.seats[decoding], batch.positions[decoding], seeds)
        self.lengths = batch.positions + 1
        for segment in batch.prefills:
            self.lengths[segment.offset : segment.offset + segment.length] = segment.start + segment.length
        self.selection: Selection | None = None

    def begin(self) -> None:
        """Select before the forward pass, where the method does, and start the loads of all offloaded layers."""
        if not self.batch.num_decodes:
            return
        seats, lengths = self.decode.seats, self.decode.lengths
        self.meter.step(seats, lengths, self.selector.selection_bytes(lengths))
        if not self.selector.dense and not self.selector.in_layer:
            self.selection = self.selector.select(self.decode)
            plan = self.kv.begin_step(seats, self.selection)
            self.meter.sparse(seats, self.selection, plan, layer=None)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `LayerAttention.attend`."""
        batch = self.batch
        self.kv.append(layer, batch.seats, batch.positions, key, value, self.lengths)
        output = torch.empty_like(query)
        if batch.num_decodes:
            output[: batch.num_decodes] = self._decode(layer, query[: batch.num_decodes], scale)
        for segment in batch.prefills:
            part = slice(segment.offset, segment.offset + segment.length)
            output[part] = self._prefill(layer, segment, query[part], key[part], value[part], scale)
        return output

    # Decode -----------------------------------------------------------------------------------------------------------

    def _decode(self, layer: int, query: Tensor, scale: float) -> Tensor:
        if self.selector.dense:
            if self.measure_recall:
                self.meter.recall(self.decode.seats, torch.ones_like(self.decode.seats, dtype=torch.float64))
            return self._decode_dense(layer, query, scale)
        selection = self._selection_of(layer, query, scale)
        if self.measure_recall:
            self._measure(layer, query, scale, selection)
        rows = self.kv.rows(layer, self.decode.seats, selection, in_layer=self.selector.in_layer)
        return sparse_attention(query, self.kv.arena.rows, rows, scale)[0]

    def _selection_of(self, layer: int, query: Tensor, scale: float) -> Selection:
        if not self.selector.in_layer:
            assert self.selection is not None
            return self.selection
        seats, lengths = self.decode.seats, self.decode.lengths
        selection = self.selector.select_in_layer(layer, self.decode, lambda: self._true_logits(layer, query, scale))
        if not self.kv.resident[layer]:  # the keys it looked at were streamed in
            self.meter.streamed(seats, lengths * (self.kv.shape.kv_heads * self.kv.shape.row_bytes // 2))
        plan = self.kv.begin_step(seats, selection, layer)
        self.meter.sparse(seats, selection, plan, layer)
        return selection

    def _decode_dense(self, layer: int, query: Tensor, scale: float) -> Tensor:
        kv, seats, lengths = self.kv, self.decode.seats, self.decode.lengths
        self.meter.dense(seats, lengths, offloaded=not kv.resident[layer])
        in_reach = pages_in_reach(kv, layer, seats)
        if in_reach is not None:
            rows, pages = in_reach
            heads, size = kv.shape.kv_heads, kv.page_size
            return paged_attention(query, rows, pages, lengths, scale, page_size=size, kv_heads=heads, tile=TILE)[0]
        parts = []
        for start in range(0, int(lengths.max()), TILE):
            buffer, rows = kv.tile(layer, seats, start, lengths.clamp(max=start + TILE))
            parts.append(sparse_attention(query, buffer, rows, scale))
        outputs, lses = zip(*parts, strict=True)
        return merge_partials(torch.stack(outputs), torch.stack(lses))

    def _true_logits(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Logits over the whole context, float32 [R, Hq, S]."""
        parts = []
        for start in range(0, int(self.decode.lengths.max()), TILE):
            buffer, rows = self.kv.tile(layer, self.decode.seats, start, self.decode.lengths.clamp(max=start + TILE))
            parts.append(attention_logits(query, buffer, rows, scale))
        return torch.cat(parts, dim=-1)

    def _measure(self, layer: int, query: Tensor, scale: float, selection: Selection) -> None:
        weights = torch.softmax(self._true_logits(layer, query, scale), dim=-1)  # [R, Hq, S]
        tokens = selection.tokens[:, self.kv.head_map[layer]]  # [R, Hkv, B]
        tokens = tokens.repeat_interleave(query.shape[1] // tokens.shape[1], dim=1)
        covered = torch.where(tokens >= 0, weights.gather(-1, tokens.clamp(min=0)), 0.0).sum(-1)
        self.meter.recall(self.decode.seats, covered.mean(-1))

    # Prefill ----------------------------------------------------------------------------------------------------------

    def _prefill(self, layer: int, segment: Segment, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Dense causal attention of a chunk: to the tokens stored before it, and to the chunk itself."""
        tile = PREFILL_TILE if query.is_cuda else TILE
        return chunk_attention(query, key, value, scale, stored_tiles(self.kv, layer, segment.seat, segment.start, tile))
