"""A retrieval head of random weights, for models of random weights: what it chooses means nothing, what it costs does."""

from __future__ import annotations

import torch

from specontext.model_shape import ModelShape
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig


def random_head(target: ModelShape) -> RetrievalHead:
    """A head as EAGLE-3 drafts of a model have it, the same one every time, in float32 on the CPU."""
    config = HeadConfig(
        "features",
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        heads=target.query_heads,
        kv_heads=target.kv_heads,
        head_dim=target.key_dim,
        feature_layers=tuple(sorted({min(2, target.depth - 1), target.depth // 2, max(0, target.depth - 3)})),
        trained_length=target.max_position,
        source="random",
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return RetrievalHead(config).requires_grad_(False)
