"""A rank's part of a retrieval head chooses what the whole head chooses for the rank's KV heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specontext.memory.facts import ModelFacts
from specontext.memory.sharing import Share
from specontext.model_shape import ModelShape
from specontext.retrieval.head import RetrievalHead, facts_of_head
from specontext.retrieval.head_config import HeadConfig
from specontext.retrieval.head_part import head_part

SHAPE = ModelShape(3, 32, 8, 4, 8, 64, 256, torch.float32)
PLAIN = HeadConfig("features", 32, 32, 64, heads=8, kv_heads=4, head_dim=8, feature_layers=(1,), qk_norm=True)
CROSSING = replace(PLAIN, head_map=((0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 3, 2)))
UNEVEN = replace(PLAIN, head_map=((0, 0, 1, 2), (0, 0, 1, 2), (0, 0, 2, 1)))
ONE_KEY = replace(PLAIN, key_heads=1, query_rank=12, key_inputs="around")
SPREAD = replace(PLAIN, head_map=((0, 1, 2, 3), (2, 3, 0, 1), (0, 1, 2, 3)))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "config, groups",
    [(PLAIN, 2), (CROSSING, 2), (UNEVEN, 2), (ONE_KEY, 2), (SPREAD, 4), (replace(PLAIN, key_heads=2), 4)],
    ids=["plain", "crossing", "uneven", "one key", "spread", "shared keys"],
)
def test_scores_are_those_of_the_groups_that_a_rank_reads(config: HeadConfig, groups: int, rank: int) -> None:
    torch.manual_seed(0)
    whole, share = RetrievalHead(config), Share(rank, 2)
    whole.set_rope(theta=500.0, yarn_factor=2.0)
    part = head_part(whole, SHAPE, share)
    assert part.config.kv_heads == groups and (part is whole) == (groups == 4)
    embeddings, features = torch.randn(9, 32), torch.randn(9, 32)
    positions = torch.arange(9)
    mine, theirs = (_scores(one, *one(embeddings, features, positions)) for one in (part, whole))
    own = share.kv_heads(SHAPE)
    for layer in range(SHAPE.layers):
        for head in range(own.start, own.stop):
            group = config.head_map[layer][head] if config.head_map else head
            if part is not whole:
                assert part.config.head_map is not None
                torch.testing.assert_close(mine[part.config.head_map[layer][head - own.start]], theirs[group])
    facts = ModelFacts("m", SHAPE, 10**6, 0, 64, facts_of_head(config))
    planned, found = share.facts(facts).head, facts_of_head(part.config)
    assert (planned.heads, planned.kv_heads, planned.key_heads) == (found.heads, found.kv_heads, found.key_heads)


def _scores(head: RetrievalHead, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits of the last token, [groups, query heads of each, tokens]."""
    groups = head.config.kv_heads
    keys = keys.repeat_interleave(groups // keys.shape[1], dim=1)
    return torch.einsum("gqd,tgd->gqt", queries[-1].unflatten(0, (groups, -1)), keys)
