"""Some rows of sequences run through the target again, with attention restricted to, or weighed by, what a selection gives.

A dense pass keeps the keys and values of all layers (`Target.observe(keep=True)`). A replay runs the model's own modules on a few
rows only, against these: what the model would say at a row if it had read other entries there. So it costs a few rows of every
layer, not a second pass over the sequence.

A row's own keys and values are the replay's. Rows that stand alone find those of all other tokens as the dense pass left them, as
a decode step after a dense prefill does; chained rows find those of the replayed rows before them, as one decode step after
another does.

Shapes: N sequences, S tokens, Q rows, Hq query and Hkv KV heads, D head dim, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from specontext.distill.target import IMPLEMENTATION, Observation, Target, TaughtPass, wide
from specontext.kernels.softmax import PLAIN, Softmax, capped
from specontext.layer_sizes import Window
from specontext.models.attention import attention_of, listening
from specontext.models.decoder import decoder_layers, decoder_of
from specontext.models.mixers import MixerCall

CHUNK_ELEMENTS = 1 << 26  # logits that are held at once
HIGHEST = 20.0  # how far, in nats, an entry that is not read may stand above those that are before its gradient is cut

Gates = Callable[[int], Tensor]  # of a layer: weights of its softmax terms [N, Hkv or 1, Q, S], bool or float


@dataclass(frozen=True, eq=False)
class Replay:
    """Rows that can be run again.

    Attributes:
        seen: with the keys and values of all layers.
        rows: int64 [N, Q], their positions.
        chained: whether rows read the replayed rows before them; they must then stand one after another.
    """

    target: Target
    seen: Observation
    rows: Tensor
    chained: bool = False

    def hidden(self, gates: Gates | None = None) -> Tensor:
        """States [N, Q, H] after the last norm; None reads everything up to each row.

        With gradients, each layer keeps its input only and is computed again in the backward pass.
        """
        model, step = self.target.model, self._step(gates)
        again = partial(_attending, model, step)
        with again(), _recomputed(model, again):
            ids = self.seen.ids.gather(1, self.rows)
            hidden: Tensor = decoder_of(model)(input_ids=ids, position_ids=self.rows, use_cache=False).last_hidden_state
        return hidden

    def _step(self, gates: Gates | None) -> _Replayed:
        queries, span = self.rows.shape[1], self.seen.ids.shape[1]
        linked = torch.ones(queries, queries, dtype=torch.bool, device=self.rows.device).tril()
        if not self.chained:
            linked = linked.logical_and(linked.T)
        token = torch.arange(span, device=self.rows.device)
        own = (token == self.rows[..., None]).float()  # [N, Q, S]
        visible = (token <= self.rows[..., None]) & ~(linked.float() @ own).bool()
        return _Replayed(self.seen, self.rows, self.chained, visible, linked, gates)


@dataclass(frozen=True, eq=False)
class _Replayed:
    """Attention of replayed rows.

    Attributes:
        seen: keys and values of each layer [N, Hkv, S, D], and inputs of mixers.
        visible: bool [N, Q, S], the stored tokens that a row may read.
        linked: bool [Q, Q], the replayed rows that a row may read.
    """

    seen: Observation
    rows: Tensor
    chained: bool
    visible: Tensor
    linked: Tensor
    gates: Gates | None

    @property
    def positions(self) -> Tensor:
        return self.rows

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
        """See `TaughtPass.attend`; the queries are those of the rows."""
        gates = None if self.gates is None else self.gates(layer)
        linked = self.linked[None]
        return self._attend(self.seen.stored[layer], query, key, value, scale, softmax, self.visible, linked, gates)

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
        """See `TaughtPass.attend_window`: nothing is selected there, so there are no gates."""
        first, token = window.first(self.rows)[..., None], torch.arange(self.visible.shape[-1], device=self.rows.device)
        visible, linked = self.visible & (token >= first), self.linked & (self.rows[:, None] >= first)
        return self._attend(self.seen.windowed[layer], query, key, value, scale, softmax, visible, linked, None)

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        """See `TaughtPass.mix`: rows stand in the dense pass's inputs, chained ones together, others each alone."""
        inputs, index = self.seen.mixed[mixer], self.rows[..., None].expand_as(hidden)
        if self.chained:
            return call.whole(inputs.scatter(1, index, hidden)).gather(1, index)
        alone = [
            call.whole(inputs.scatter(1, at, row)).gather(1, at)
            for at, row in zip(index.split(1, dim=1), hidden.split(1, dim=1), strict=True)
        ]
        return torch.cat(alone, dim=1)

    def _attend(
        self,
        stored: tuple[Tensor, Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax,
        visible: Tensor,
        linked: Tensor,
        gates: Tensor | None,
    ) -> Tensor:
        """Args: visible bool [N, Q, S] and linked bool [N or 1, Q, Q], what rows may read; gates of a layer, see `Gates`."""
        (past_key, past_value), heads = stored, key.shape[1]
        grouped = query.unflatten(1, (heads, -1))  # [N, Hkv, Hq / Hkv, Q, D]
        past = capped(wide(grouped @ past_key[:, :, None].transpose(-1, -2)) * scale, softmax.cap)
        own = capped(wide(grouped @ key[:, :, None].transpose(-1, -2)) * scale, softmax.cap)
        past = past.masked_fill(~visible[:, None, None], -torch.inf)
        own = own.masked_fill(~linked[:, None, None], -torch.inf)
        if gates is None:
            top = torch.maximum(past.detach().amax(-1), own.detach().amax(-1))[..., None]
            past, own = (past - top).exp(), (own - top).exp()
        else:
            columns = self.rows[:, None, None].expand(-1, gates.shape[1], gates.shape[2], -1)
            past_gates, own_gates = gates[:, :, None], gates.gather(-1, columns)[:, :, None]
            top = torch.maximum(_highest(past, past_gates), _highest(own, own_gates))
            past, own = (past - top).clamp(max=HIGHEST).exp() * past_gates, (own - top).clamp(max=HIGHEST).exp() * own_gates
        total = past.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
        if softmax.sinks is not None:
            total = total + (wide(softmax.sinks).view(heads, -1, 1, 1) - top).clamp(max=HIGHEST).exp()
        output = (past / total).to(value.dtype) @ past_value[:, :, None] + (own / total).to(value.dtype) @ value[:, :, None]
        return output.flatten(1, 2)


def _highest(logits: Tensor, gates: Tensor) -> Tensor:
    """The highest logit that is read, [..., 1]."""
    return logits.detach().masked_fill(gates.detach() <= 0, -torch.inf).amax(-1, keepdim=True)


@contextmanager
def _attending(model: PreTrainedModel, step: TaughtPass) -> Iterator[None]:
    with attention_of(model, IMPLEMENTATION), listening(model, step):
        yield


@contextmanager
def _recomputed(model: PreTrainedModel, again: Callable[[], Any]) -> Iterator[None]:
    """Inside, decoder layers keep their inputs only; in the backward pass they run again inside `again()`."""
    if not torch.is_grad_enabled():
        yield
        return
    layers = decoder_layers(model)
    before = [layer.__dict__.get("forward") for layer in layers]

    def run(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with again():
            return forward(*args, **options)

    try:
        for layer in layers:
            layer.forward = partial(checkpoint, partial(run, layer.forward), use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def divergence(target: Target, hidden: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || hidden) in nats of the next-token distributions of states [N, Q, H]: float32 [N, Q].

    A gradient goes to `hidden`; logits are held for some rows at a time.
    """

    def compare(states: Tensor, wanted: Tensor) -> Tensor:
        mine = target.logits(states).log_softmax(-1)
        with torch.no_grad():
            theirs = target.logits(wanted).log_softmax(-1)
        return (theirs.exp() * (theirs - mine)).sum(-1)

    return _by_rows(target, compare, hidden, reference)


def log_odds(target: Target, hidden: Tensor, tokens: Tensor) -> Tensor:
    """log p / (1 - p) float32 [N, Q] of the probabilities that states [N, Q, H] give to tokens int64 [N, Q]."""

    def look_up(states: Tensor, said: Tensor) -> Tensor:
        logits, place = target.logits(states), said[:, None]
        return logits.gather(-1, place)[:, 0] - logits.scatter(-1, place, -torch.inf).logsumexp(-1)

    return _by_rows(target, look_up, hidden, tokens)


@torch.no_grad()
def sampled(target: Target, hidden: Tensor, chance: Tensor) -> Tensor:
    """Tokens int64 [N, Q] of the model's own distributions at states [N, Q, H]; chance [N, Q] in 0 .. 1 decides."""

    def draw(states: Tensor, chance: Tensor) -> Tensor:
        below = target.logits(states).softmax(-1).cumsum(-1)
        return (below < chance[:, None] * below[:, -1:]).sum(-1).clamp(max=below.shape[-1] - 1)

    return _by_rows(target, draw, hidden, chance)


def _by_rows(target: Target, function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, other: Tensor) -> Tensor:
    """function of states [P, H] and what goes with them, a part of the rows after another: [N, Q]."""
    states, beside = hidden.flatten(0, 1), other.flatten(0, 1)
    rows = max(1, CHUNK_ELEMENTS // target.output_matrix.shape[0])
    parts = zip(states.split(rows), beside.split(rows), strict=True)
    done = [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(done).view(hidden.shape[:2])
