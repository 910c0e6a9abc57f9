"""The target model as a teacher: one dense pass shows its features, its last hidden states and its attention.

Attention is shown layer by layer, for sampled query positions only, and is never kept: what a listener does not add up is
gone. So a long sequence costs the memory of one layer's sampled rows. Keys and values of all layers are kept only where some rows
will be run again (`specontext.distill.replay`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from specontext.kernels.dense_attention import causal_attention
from specontext.kernels.softmax import PLAIN, Softmax, capped
from specontext.kernels.window_attention import window_attention
from specontext.layer_sizes import Window
from specontext.model_shape import ModelShape
from specontext.models.attention import attention_of, listening, running_of, understood
from specontext.models.decoder import decoder_of, output_layer
from specontext.models.features import FeatureTaps
from specontext.models.latents import EXPAND, latents_of
from specontext.models.mixers import RUNNING, MixerCall
from specontext.models.temperature import at_positions
from specontext.retrieval.head import RetrievalHead

IMPLEMENTATION = "specontext_teaching"
LayerListener = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Observation:
    """What one pass of the target shows.

    Attributes:
        ids: int64 [N, S], the tokens.
        embeddings: [N, S, H], of the tokens.
        features: [N, S, F * H], each token's own.
        hidden: [N, S, H], after the last norm: what the output matrix reads.
        stored: of each layer keys and values [N, Hkv, S, D], where they were asked for.
        windowed: the same of the layers with a window.
        mixed: of each mixer its input [N, S, H], likewise.
    """

    ids: Tensor
    embeddings: Tensor
    features: Tensor
    hidden: Tensor
    stored: tuple[tuple[Tensor, Tensor], ...] = ()
    windowed: tuple[tuple[Tensor, Tensor], ...] = ()
    mixed: tuple[Tensor, ...] = ()

    def embedded(self, head: RetrievalHead) -> Tensor:
        """Embeddings [N, S, H] of the tokens as a head sees them."""
        return head.embedded(self.ids, lambda _: self.embeddings)


class TaughtPass(Protocol):
    """What one pass of the target does when a layer calls attention; layers are numbered as in `LayerAttention`.

    Attributes:
        positions: int64 [N, S], of its tokens; None where they are 0 .. S - 1.
    """

    @property
    def positions(self) -> Tensor | None: ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        """The attention output [N, Hq, S, D] of q [N, Hq, S, D], k and v [N, Hkv, S, D]; all after RoPE.

        Args:
            stored: k and v are those of an earlier layer, which came with the same number.
        """
        ...

    def attend_window(
        self,
        layer: int,
        window: Window,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        """The same in a layer with a window."""
        ...

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        """The output [N, S, H] of a mixer, which keeps a state instead of KV, for its input [N, S, H]."""
        ...


@dataclass(frozen=True, eq=False)
class _Dense:
    """Causal attention over whole sequences.

    Attributes:
        rows: int64 [N, Q], query positions whose attention is shown to the listeners.
        readers: how many layers read the KV of each; they are shown together, once the last of them has come.
        stored, windowed: take keys and values of every layer where they are kept.
        mixed: takes the inputs of mixers, likewise.
        shown: weights of layers whose other readers are still to come.
    """

    rows: Tensor | None
    listeners: tuple[LayerListener, ...]
    keep: bool
    readers: Mapping[int, int]
    stored: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    windowed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    shown: dict[int, list[Tensor]] = field(default_factory=dict)
    positions = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        if self.rows is not None and self.listeners:
            index = self.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
            logits = capped(wide(grouped_scores(query.gather(2, index), key)) * scale, softmax.cap)
            future = torch.arange(key.shape[2], device=key.device) > self.rows[..., None]  # [N, Q, S]
            weights = probabilities(logits.masked_fill_(future[:, None], -math.inf), softmax)
            self._show(layer, weights, key.shape[1])
        if self.keep and not stored:
            self.stored.append((key, value))
        if softmax.plain:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return each_sequence(lambda q, k, v: causal_attention(q, k, v, scale, softmax), query, key, value)

    def _show(self, layer: int, weights: Tensor, groups: int) -> None:
        """Show the attention [N, Hq, Q, S] of a layer, with that of the others that read the same KV."""
        if self.readers[layer] > 1:
            so_far = self.shown.setdefault(layer, [])
            so_far.append(weights.unflatten(1, (groups, -1)))
            if len(so_far) < self.readers[layer]:
                return
            weights = torch.cat(self.shown.pop(layer), dim=2).flatten(1, 2)
        for listener in self.listeners:
            listener(layer, weights)

    def attend_window(
        self,
        layer: int,
        window: Window,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        if self.keep and not stored:
            self.windowed.append((key, value))
        return each_sequence(lambda q, k, v: window_attention(q, k, v, scale, window, softmax=softmax), query, key, value)

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        call.check()
        if self.keep:
            self.mixed.append(hidden)
        return call.whole(hidden)


class Target:
    """A Hugging Face decoder that a retrieval head learns from; it is never trained itself.

    Attributes:
        layers, groups, query_heads: L, Hkv and Hq of its attention to the whole context; layers are those that keep KV.
    """

    def __init__(self, model: PreTrainedModel, feature_layers: tuple[int, ...]) -> None:
        AttentionInterface.register(IMPLEMENTATION, teaching_attention)
        self.model, self.feature_layers = model.eval().requires_grad_(False), feature_layers
        shape = ModelShape.from_config(model.config)
        running_of(model).know(shape)
        self.layers, self.groups, self.query_heads = shape.layers, shape.kv_heads, shape.query_heads
        self._readers = Counter(shape.read_order)
        self._output_layer = output_layer(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def output_matrix(self) -> Tensor:
        """[V, H], which turns `Observation.hidden` into logits."""
        return self.model.get_output_embeddings().weight

    def logits(self, states: Tensor) -> Tensor:
        """Logits [P, V] that the model makes of states [P, H] of `Observation.hidden`, in float32 or wider."""
        return wide(self._output_layer(inputs_embeds=states[None], use_cache=False).logits[0])

    @torch.no_grad()
    def observe(self, ids: Tensor, rows: Tensor | None = None, *listeners: LayerListener, keep: bool = False) -> Observation:
        """Run sequences through the target.

        Args:
            ids: int64 [N, S], padded at the end only.
            rows: int64 [N, Q], query positions whose attention is shown.
            listeners: called for every layer with its index and the probabilities float32 [N, Hq, Q, S] of these rows; where
                several layers read the same KV once for all of them, with the query heads of all beside each other, by KV head.
            keep: keep the keys and values of all layers, for `Replay`.

        Raises:
            ModelError: the model's attention is not plain causal softmax attention.
        """
        dense = _Dense(rows, listeners, keep, self._readers)
        taps = FeatureTaps(self.model, self.feature_layers) if self.feature_layers else None
        try:
            with attention_of(self.model, IMPLEMENTATION), listening(self.model, dense):
                out = decoder_of(self.model)(input_ids=ids, use_cache=False)
            hidden = out.last_hidden_state
            features = hidden.new_zeros((*ids.shape, 0)) if taps is None else taps.take()
        finally:
            if taps is not None:
                taps.remove()
        kept = (tuple(dense.stored), tuple(dense.windowed), tuple(dense.mixed))
        return Observation(ids, self.model.get_input_embeddings()(ids), features, hidden, *kept)


def teaching_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in Hugging Face's calling convention, as the running pass computes it.

    Args:
        query: [N, Hq, S, D] after RoPE; key and value [N, Hkv, S, D].

    Raises:
        ModelError: a feature that plain causal attention lacks.
    """
    running = getattr(module, RUNNING)
    layer, window, stored = running.places[module.layer_idx]
    softmax = understood(attention_mask, options, running.longest, window)
    taught: TaughtPass = running.listener
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if taught.positions is not None:
        query = at_positions(module, query, taught.positions[:, None])
    if EXPAND in vars(module):  # it hands on rows of latents, which are one KV head
        rows = latents_of(module)
        query = rows.absorbed(query.transpose(1, 2)).transpose(1, 2)
        out = taught.attend(layer, query, key, value, scale, softmax)
        out = rows.lifted(out.transpose(1, 2)).transpose(1, 2)
    elif window is None:
        out = taught.attend(layer, query, key, value, scale, softmax, stored=stored)
    else:
        out = taught.attend_window(layer, window, query, key, value, scale, softmax, stored=stored)
    return out.transpose(1, 2), None


def each_sequence(attention: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor) -> Tensor:
    """Attention of one sequence, which takes and gives [S, heads, D], for all of [N, heads, S, D]."""
    return torch.stack([attention(*(x.transpose(0, 1) for x in each)).transpose(0, 1) for each in zip(*tensors, strict=True)])


def probabilities(logits: Tensor, softmax: Softmax) -> Tensor:
    """Weights of logits [N, Hq, Q, S]; where there are sinks, they do not sum to 1."""
    if softmax.sinks is None:
        return logits.softmax(-1)
    sinks = softmax.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
    return torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1]


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """Dot products [N, Hq, Q, S] of queries [N, Hq, Q, D] with the keys [N, G, S, D] of their group."""
    scores = query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].transpose(-1, -2)
    return scores.flatten(1, 2)


def wide(x: Tensor) -> Tensor:
    """In float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
