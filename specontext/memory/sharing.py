"""What one of several ranks has of a model: its heads, and the bytes of its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specontext.errors import ConfigError
from specontext.memory.facts import HeadFacts, ModelFacts, weight_bytes
from specontext.model_shape import ModelShape


@dataclass(frozen=True)
class Share:
    """One rank's part of a model's heads: as many query heads as the others, and the KV heads that these read.

    Where there are more ranks than KV heads, several ranks have the same one, and all of them have the latents that are keys and
    values of all heads.
    """

    rank: int
    size: int

    def check(self, shape: ModelShape) -> None:
        """Raises ConfigError for heads that cannot be shared so."""
        size = self.size
        for heads in (shape.kv_heads, (shape.window_heads or (shape.kv_heads,))[0]):
            if shape.query_heads % size or (heads % size and size % heads):
                raise ConfigError(
                    f"tensor_parallel_size {size} does not fit a model of {shape.query_heads} query heads and {heads} KV heads: "
                    f"choose a number that divides both, or a multiple of {heads} that divides {shape.query_heads}"
                )

    def shape(self, shape: ModelShape) -> ModelShape:
        """The shape with this rank's heads only."""
        self.check(shape)
        near = shape.window_heads
        return replace(
            shape,
            query_heads=shape.query_heads // self.size,
            kv_heads=max(1, shape.kv_heads // self.size),
            window_heads=near and (max(1, near[0] // self.size), near[1]),
        )

    def kv_heads(self, shape: ModelShape) -> slice:
        """Which of the model's KV heads it has, in layers that attend to the whole context."""
        return self.some_of(shape.kv_heads)

    def some_of(self, kv_heads: int) -> slice:
        """Which of a layer's KV heads it has."""
        first = self.rank * kv_heads // self.size
        return slice(first, first + max(1, kv_heads // self.size))

    def outputs(self, width: int) -> slice:
        """Which of the output layer's `width` outputs it has: as many as the others, the last ones perhaps fewer."""
        each = -(-width // self.size)
        return slice(min(self.rank * each, width), min((self.rank + 1) * each, width))

    def facts(self, facts: ModelFacts) -> ModelFacts:
        """Sizes of its part: of all layers but their norms and `whole_modules`, of the output layer, and of the retrieval head's
        groups and keys.

        Embeddings are whole. So are the head's weights here, which are too many then; routers, biases of sums and norms beyond
        two a layer are counted as if they were split. All are some thousandths of a model. Of quantised weights all layers count
        alike.

        Raises:
            ConfigError: heads that cannot be shared so.
        """
        if self.size == 1:
            return facts
        whole, part = facts.shape, self.shape(facts.shape)
        table = whole.vocab_size * whole.hidden_size
        own = self.outputs(whole.vocab_size)
        elsewhere = table - (own.stop - own.start) * whole.hidden_size  # of the output layer
        norms = (2 * whole.depth + 1) * whole.hidden_size
        attention, own_attention = _attention(whole), _attention(part)
        tables = facts.lookup_parameters + table  # of embeddings, and the output layer
        rest = facts.parameters - tables - norms - attention - facts.whole_parameters
        left_out = attention - own_attention + rest - rest // self.size
        stored = facts.stored_bytes
        if stored is not None:
            layers = attention + rest + facts.whole_parameters
            plain = weight_bytes(facts.parameters - layers, whole.dtype)
            stored -= round((stored - plain) * left_out / layers) + weight_bytes(0 if facts.tied else elsewhere, whole.dtype)
        return replace(
            facts,
            shape=part,
            stored_bytes=stored,
            head=self._head(facts),
            parameters=facts.parameters - left_out - (0 if facts.tied else elsewhere),
            lookup_parameters=facts.lookup_parameters + (elsewhere if facts.tied else 0),
            intermediate_size=facts.intermediate_size // self.size,
        )

    def _head(self, facts: ModelFacts) -> HeadFacts:
        head = facts.head
        if not head.kv_heads or head.key_heads not in (1, head.kv_heads):  # none, or one that ranks have whole
            return head
        most = max(map(len, self.groups_read(facts.shape, facts.head_map)))
        keys = most if head.key_heads == head.kv_heads else 1
        return replace(head, heads=head.heads // head.kv_heads * most, kv_heads=most, key_heads=keys)

    def groups_read(self, shape: ModelShape, head_map: Sequence[Sequence[int]]) -> list[list[int]]:
        """The groups of a retrieval head that each rank's KV heads read, ascending."""
        own = [Share(rank, self.size).kv_heads(shape) for rank in range(self.size)]
        return [sorted({group for row in head_map for group in row[heads]}) for heads in own]


def _attention(shape: ModelShape) -> int:
    """Weights of all layers' projections of attention, where they are of heads alone."""
    if shape.latent is not None:
        return 0
    far = near = (shape.kv_heads, shape.head_dim)
    if shape.window_heads is not None:
        near = shape.window_heads
    windows = dict(zip(shape.attentive, shape.windows, strict=False))
    kinds = (far if windows.get(layer) is None else near for layer in shape.attentive)
    return sum(shape.hidden_size * 2 * dim * (shape.query_heads + heads) for heads, dim in kinds)
