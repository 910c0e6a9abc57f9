"""What a selection method is: a policy that names KV entries and knows nothing of memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specontext.core import Batch, ModelShape, Selection


@dataclass(frozen=True)
class DecodeTokens:
    """The decode tokens of a step, one a request.

    Attributes:
        token_ids, seats, positions, seeds: int64 [R]; a negative position is padding.
        span: no request has more tokens in context; known without asking the device.
    """

    token_ids: Tensor
    seats: Tensor
    positions: Tensor
    seeds: Tensor
    span: int

    @property
    def lengths(self) -> Tensor:
        """Tokens in context, the one being processed included: int64 [R]."""
        return self.positions + 1

    @classmethod
    def of(cls, batch: Batch) -> DecodeTokens:
        """The decode tokens of a batch."""
        decoding = slice(0, batch.num_decodes)
        return cls(batch.token_ids[decoding], batch.seats[decoding], batch.positions[decoding], batch.seeds, batch.span)


@dataclass(frozen=True)
class Budget:
    """How many entries a KV head reads: `sink` first tokens, `recent` last tokens, the rest chosen by score."""

    total: int
    sink: int
    recent: int

    @property
    def scored(self) -> int:
        return self.total - self.sink - self.recent

    def candidates_end(self, lengths: Tensor) -> Tensor:
        """End of the positions sink .. end - 1 that compete by score."""
        return (lengths - self.recent).clamp(min=self.sink)

    def compose(self, scored: Tensor, lengths: Tensor) -> Selection:
        """The selection of sinks, scored tokens and recent tokens.

        Args:
            scored: int64 [R, G, K] ascending candidates, then -1 where there is none.
            lengths: int64 [R].
        """
        groups = scored.shape[1]
        end = self.candidates_end(lengths)[:, None]
        sinks = torch.arange(self.sink, device=scored.device).expand(len(lengths), -1)
        recents = end + torch.arange(self.recent, device=scored.device)
        fixed = [torch.where(t < lengths[:, None], t, -1)[:, None].expand(-1, groups, -1) for t in (sinks, recents)]
        tokens = torch.cat((fixed[0], scored, fixed[1]), dim=-1)
        is_scored = torch.zeros_like(tokens, dtype=torch.bool)
        is_scored[..., self.sink : tokens.shape[-1] - self.recent] = scored >= 0
        return Selection(tokens, is_scored)


class Selector(ABC):
    """A selection method.

    A method selects either once before the forward pass, for all layers (`select`), or inside each layer, when it needs
    that layer's query (`in_layer`, `select_in_layer`); a dense method (`dense`) selects nothing and everything is read.

    Attributes:
        groups: G, how many token sets it chooses for each request.
        head_map: int64 [L, Hkv], the group whose set a KV head reads.
    """

    in_layer: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    groups: int
    head_map: Tensor

    def open(self, seat: int, tokens: int) -> None:  # noqa: B027  methods without state have nothing to do
        """A request takes a seat, with room for its first `tokens` tokens."""

    def grow(self, seat: int, tokens: int) -> None:  # noqa: B027
        """Make room for `tokens` tokens of a request; raises OutOfPagesError and takes nothing when there is none."""

    def close(self, seat: int) -> None:  # noqa: B027
        """The request leaves its seat."""

    def save(self, seat: int, tokens: int) -> object:
        """The method's state of a request of `tokens` tokens that has to leave its seat, in host memory."""
        return None

    def restore(self, seat: int, tokens: int, state: object) -> None:  # noqa: B027
        """Put saved state into a seat that is open with room for it."""

    def select(self, step: DecodeTokens) -> Selection:
        """Choose for all layers, before the forward pass."""
        raise NotImplementedError

    def select_in_layer(self, layer: int, step: DecodeTokens, logits: Callable[[], Tensor]) -> Selection:
        """Choose for one layer.

        Args:
            logits: computes the layer's true attention logits over the whole context, float32 [R, Hq, S].
        """
        raise NotImplementedError

    def observe(self, batch: Batch, features: Tensor | None) -> None:  # noqa: B027
        """See the tokens of a step after the forward pass, with their features [T, F * H] if the method taps any."""

    @abstractmethod
    def selection_bytes(self, lengths: Tensor) -> Tensor:
        """Bytes that choosing has to read for requests of these lengths: int64 [R]."""

    @property
    def held_pages(self) -> list[list[int]]:
        """Pages of the device's arena that the method's state lies in."""
        return []


def uniform_map(shape: ModelShape, groups: int) -> Tensor:
    """Head map of KV head h to group h in every layer, or of all heads to the only group."""
    assert groups in (1, shape.kv_heads)
    row = torch.arange(shape.kv_heads) if groups > 1 else torch.zeros(shape.kv_heads, dtype=torch.int64)
    return row.expand(shape.layers, -1).clone()
