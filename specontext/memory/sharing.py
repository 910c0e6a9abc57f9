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
        """Raises ConfigError for heads that cannot be shared so, and layers with a window."""
        if shape.windowed:
            raise ConfigError("layers that attend to a window do not work with tensor_parallel_size: leave it out")
        if shape.latent is not None:
            raise ConfigError("multi-head latent attention does not work with tensor_parallel_size: leave it out")
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

    def facts(self, facts: ModelFacts) -> ModelFacts:
        """Sizes of its part, where feed-forward layers are gated ones; embeddings, norms and retrieval head are whole.

        Raises:
            ConfigError: heads that cannot be shared so, or quantised weights.
        """
        if self.size == 1:
            return facts
        if facts.stored_bytes is not None:
            raise ConfigError("quantised weights do not work with tensor_parallel_size: leave one of them out")
        whole, part = facts.shape, self.shape(facts.shape)
        width = facts.intermediate_size // self.size
        left_out = _layer_numbers(whole, facts.intermediate_size) - _layer_numbers(part, width)
        return replace(facts, shape=part, parameters=facts.parameters - whole.layers * left_out, intermediate_size=width)


def _layer_numbers(shape: ModelShape, intermediate_size: int) -> int:
    """Weights of a layer's attention and of its feed-forward."""
    return shape.hidden_size * (2 * shape.head_dim * (shape.query_heads + shape.kv_heads) + 3 * intermediate_size)
