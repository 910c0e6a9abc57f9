"""What one of several ranks has of a model: its heads, and the bytes of its part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from specontext.core import ModelShape
from specontext.errors import ConfigError
from specontext.memory.facts import ModelFacts


@dataclass(frozen=True)
class Share:
    """One rank's part of a model's heads: as many query heads as the others, and the KV heads that these read.

    Where there are more ranks than KV heads, several ranks have the same one.
    """

    rank: int
    size: int

    def check(self, shape: ModelShape) -> None:
        """Raises ConfigError for heads that cannot be shared so."""
        heads, size = shape.kv_heads, self.size
        if shape.query_heads % size or (heads % size and size % heads):
            raise ConfigError(
                f"tensor_parallel_size {size} does not fit a model of {shape.query_heads} query heads and {heads} KV heads: "
                f"choose a number that divides both, or a multiple of {heads} that divides {shape.query_heads}"
            )

    def shape(self, shape: ModelShape) -> ModelShape:
        """The shape with this rank's heads only."""
        self.check(shape)
        return replace(shape, query_heads=shape.query_heads // self.size, kv_heads=max(1, shape.kv_heads // self.size))

    def kv_heads(self, shape: ModelShape) -> slice:
        """Which of the model's KV heads it has."""
        count = max(1, shape.kv_heads // self.size)
        first = self.rank * shape.kv_heads // self.size
        return slice(first, first + count)

    def outputs(self, width: int) -> slice:
        """Which of the output layer's `width` outputs it has: as many as the others, the last ones perhaps fewer."""
        each = -(-width // self.size)
        return slice(min(self.rank * each, width), min((self.rank + 1) * each, width))

    def facts(self, facts: ModelFacts) -> ModelFacts:
        """Sizes of its part: of all layers but their norms, and of the output layer; embeddings and retrieval head are whole.

        Routers, and norms beyond two a layer, are counted as if they were split: some thousandths of a model.

        Raises:
            ConfigError: heads that cannot be shared so, or quantised weights.
        """
        if self.size == 1:
            return facts
        if facts.stored_bytes is not None:
            raise ConfigError("quantised weights do not work with tensor_parallel_size: leave one of them out")
        whole, part = facts.shape, self.shape(facts.shape)
        tied, table = not facts.lookup_parameters, whole.vocab_size * whole.hidden_size
        own = self.outputs(whole.vocab_size)
        elsewhere = table - (own.stop - own.start) * whole.hidden_size  # of the output layer
        attention, norms = whole.depth * _attention(whole), (2 * whole.depth + 1) * whole.hidden_size
        rest = facts.parameters - table * (1 if tied else 2) - norms - attention
        left_out = attention - whole.depth * _attention(part) + rest - rest // self.size
        return replace(
            facts,
            shape=part,
            parameters=facts.parameters - left_out - (0 if tied else elsewhere),
            lookup_parameters=elsewhere if tied else facts.lookup_parameters,
            intermediate_size=facts.intermediate_size // self.size,
        )


def _attention(shape: ModelShape) -> int:
    """Weights of a layer's projections."""
    return shape.hidden_size * 2 * shape.head_dim * (shape.query_heads + shape.kv_heads)
