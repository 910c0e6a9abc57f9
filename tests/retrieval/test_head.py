"""The retrieval head against a plain reference of EAGLE-3's attention input and Hugging Face's rotary embedding."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specontext.errors import HeadError
from specontext.model_shape import ModelShape
from specontext.retrieval.head import RetrievalHead, rotate
from specontext.retrieval.head_config import HeadConfig

TARGET = ModelShape(
    layers=4, hidden_size=32, query_heads=8, kv_heads=2, head_dim=8, vocab_size=100, max_position=128, dtype=torch.float32
)


def config(**changes: Any) -> HeadConfig:
    values: dict[str, Any] = {
        "variant": "features",
        "hidden_size": 32,
        "target_hidden_size": 32,
        "vocab_size": 100,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 12,
        "feature_layers": (3, 0, 1),
        "rope_theta": 500.0,
    }
    return HeadConfig(**values | changes)


def random_head(**changes: Any) -> RetrievalHead:
    head = RetrievalHead(config(**changes))
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0.7, 0.4, generator=generator)
    return head.requires_grad_(False)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def hugging_face_rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotates x [T, heads, D] as Hugging Face's Llama does."""
    rope_parameters = {"rope_type": "default", "rope_theta": theta}
    rotary = LlamaRotaryEmbedding(LlamaConfig(head_dim=x.shape[-1], rope_parameters=rope_parameters))
    cos, sin = rotary(x, positions[None])
    rotated, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    return rotated[0].transpose(0, 1)


def test_rotation_equals_hugging_face() -> None:
    x, positions = torch.randn(9, 3, 12, generator=torch.Generator().manual_seed(0)), torch.arange(0, 900, 100)
    angles = positions[:, None] * 500.0 ** (-torch.arange(0, 12, 2) / 12)
    rotated = rotate(x, angles.cos()[:, None], angles.sin()[:, None])
    torch.testing.assert_close(rotated, hugging_face_rope(x, positions, 500.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["features", "embedding"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_equal_the_attention_input_of_eagle3(variant: str, qk_norm: bool) -> None:
    features_used = variant == "features"
    head = random_head(variant=variant, feature_layers=(3, 0, 1) if features_used else (), qk_norm=qk_norm)
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(7, 32, generator=generator)
    features = torch.randn(7, 3 * 32, generator=generator) if features_used else None
    positions = torch.tensor([1, 2, 3, 50, 51, 120, 7])
    weights = head.state_dict()

    x = norm(embeddings, weights["input_layernorm.weight"])
    if features is not None:
        before = torch.cat((torch.zeros(1, 3 * 32), features[:-1]))
        x = torch.cat((x, norm(before @ weights["fc.weight"].T, weights["hidden_norm.weight"])), -1)
    expected = []
    for name, heads in (("q", 6), ("k", 2)):
        projected = (x.float() @ weights[f"{name}_proj.weight"].T).view(7, heads, 12)
        if qk_norm:
            projected = norm(projected, weights[f"{name}_norm.weight"]).float()
        expected.append(hugging_face_rope(projected, positions, 500.0))

    queries, keys = head(embeddings, features, positions)
    torch.testing.assert_close(queries, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(keys, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 5])
def test_few_keys_that_know_their_own_token_serve_many_queries(rank: int | None) -> None:
    head = random_head(kv_heads=6, heads=12, key_heads=2, key_inputs="around", query_rank=rank)
    generator = torch.Generator().manual_seed(1)
    embeddings, features = (torch.randn(7, width, generator=generator) for width in (32, 3 * 32))
    weights = head.state_dict()
    own = norm(features @ weights["fc.weight"].T, weights["hidden_norm.weight"])
    x = norm(embeddings, weights["input_layernorm.weight"])
    before = torch.cat((torch.zeros(1, 32), own[:-1]))
    query = weights["q_proj.weight"] if rank is None else weights["q_b_proj.weight"] @ weights["q_a_proj.weight"]
    expected = (
        (torch.cat((x, before), -1).float() @ query.T).view(7, 12, 12),
        (torch.cat((x, own, before), -1).float() @ weights["k_proj.weight"].T).view(7, 2, 12),
    )
    for mine, plain in zip(head(embeddings, features, torch.arange(7)), expected, strict=True):
        torch.testing.assert_close(mine, hugging_face_rope(plain, torch.arange(7), 500.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"key_heads": 1, "key_inputs": "around", "query_rank": 5}])
def test_queries_of_some_rows_are_those_of_all(changes: dict[str, Any]) -> None:
    head, generator = random_head(**changes), torch.Generator().manual_seed(2)
    embeddings, features = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 5, 96, generator=generator)
    rows = torch.tensor([[4, 0, 2], [1, 1, 3]])
    queries, keys = head(embeddings, features, torch.arange(5))
    some, same = head(embeddings, features, torch.arange(5), rows)
    torch.testing.assert_close(same, keys)
    for n in range(2):
        torch.testing.assert_close(some[n], queries[n, rows[n]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"key_heads": 1, "key_inputs": "around", "query_rank": 5}])
def test_a_token_s_key_does_not_depend_on_its_company(changes: dict[str, Any]) -> None:
    head, generator = random_head(**changes), torch.Generator().manual_seed(2)
    embeddings, features = torch.randn(5, 32, generator=generator), torch.randn(5, 96, generator=generator)
    queries, together = head(embeddings, features, torch.arange(5))
    fused = head.fuse(features)
    for i in range(5):
        before = fused[i - 1 : i] if i else torch.zeros(1, 32)
        alone = head.keys(embeddings[i : i + 1], fused[i : i + 1], before, torch.tensor([i]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
        query = head.queries(embeddings[i : i + 1], before, torch.tensor([i]))
        torch.testing.assert_close(query[0], queries[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "output"}, "unknown retrieval head variant 'output'"),
        ({"heads": 5}, "5 query heads do not divide into 2 retrieval groups"),
        ({"key_inputs": "after"}, "unknown key_inputs 'after'"),
        ({"key_inputs": "around", "variant": "embedding"}, "key_inputs 'around' reads features"),
        ({"key_heads": 4}, "2 retrieval groups do not divide into 4 key heads"),
        ({"key_heads": 0}, "key_heads of a retrieval head must be a positive integer or null"),
        ({"query_rank": 2.5}, "query_rank of a retrieval head must be a positive integer or null"),
        ({"kv_heads": 0}, "kv_heads of a retrieval head must be a positive integer"),
        ({"feature_layers": ()}, "must name its feature_layers"),
        ({"feature_layers": (1, 2, 1)}, r"feature_layers \[1, 2, 1\] are not distinct"),
        ({"rope_theta": 0}, "rope_theta of a retrieval head must be a number above 0"),
        ({"rope_theta": "1e4"}, "rope_theta of a retrieval head must be a number above 0"),
        ({"yarn": 1}, "yarn of a retrieval head must be true or false"),
        ({"draft_parameters": 0}, "draft_parameters of a retrieval head must be a positive integer or null"),
        ({"head_map": ((0, 1.0),)}, "head_map of a retrieval head must be rows of group numbers"),
    ],
)
def test_a_config_that_contradicts_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hidden_size": 48}, r"hidden size 48 \(the model has 32\)"),
        ({"hidden_size": 48}, r"48 \(the model has 32\)"),
        ({"vocab_size": 99}, r"vocabulary 99 \(the model has 100\)"),
        ({"feature_layers": (0, 5)}, r"feature layers \[0, 5\] \(the model has 4 layers\)"),
        ({"feature_layers": (-1, 2)}, r"feature layers \[-1, 2\]"),
        ({"head_map": ((0, 1),) * 3}, r"head map \(needs 4 rows of 2 groups below 2\)"),
        ({"head_map": ((0, 1, 1),) * 4}, "head map"),
        ({"head_map": ((0, 2),) * 4}, "head map"),
        ({"head_map": ((0, -1),) * 4}, "head map"),
    ],
)
def test_a_head_of_another_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=f"made for another model: .*{message}"):
        config(**changes).check_target(TARGET)


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    with pytest.raises(HeadError, match=r"hidden size 8 .*vocabulary 7 .*feature layers \[9\]"):
        config(target_hidden_size=8, vocab_size=7, kv_heads=3, feature_layers=(9,)).check_target(TARGET)


def test_other_groups_than_the_model_s_kv_heads_need_a_head_map() -> None:
    with pytest.raises(HeadError, match=r"3 groups and the model 2 KV heads, .*head map: .*specontext head calibrate"):
        config(kv_heads=3).check_target(TARGET)
    config(kv_heads=3).check_target(TARGET, need_map=False)
    with pytest.raises(HeadError, match=r"made for another model: .*head map"):
        config(kv_heads=3, head_map=((0, 3),) * 4).check_target(TARGET, need_map=False)


def test_fitting_heads_are_accepted() -> None:
    config().check_target(TARGET)
    config(feature_layers=(0, 4)).check_target(TARGET)  # the last hidden state is a feature too
    config(kv_heads=3, head_map=((0, 2), (1, 1), (2, 0), (0, 0))).check_target(TARGET)


def test_the_config_survives_its_json_form() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    known = {"draft_parameters": 5, "draft_embedding_parameters": 7, "source_hash": "ab", "yarn": False, "rope_scaling": scaling}
    original = config(head_map=((0, 1),) * 4, recommended_budget=64, qk_norm=True, **known)
    assert HeadConfig.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_directories_from_before_the_optional_fields_are_read() -> None:
    values = config().to_dict()
    for name in ("yarn", "draft_parameters", "draft_embedding_parameters", "source_hash", "rope_scaling"):
        del values[name]
    assert HeadConfig.from_dict(values) == config()


@pytest.mark.parametrize(
    ("change", "message"), [({"speed": 3}, "unknown entries .*speed"), ({"variant": None}, "unknown retrieval head variant")]
)
def test_a_config_file_with_odd_entries(change: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        HeadConfig.from_dict(config().to_dict() | change)


def test_a_config_file_that_lacks_entries() -> None:
    values = config().to_dict()
    del values["head_dim"]
    with pytest.raises(HeadError, match=r"incomplete or wrong: .*head_dim"):
        HeadConfig.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size of a retrieval head must be a positive integer"),
        ({"kv_heads": 0}, "kv_heads of a retrieval head must be a positive integer"),
        ({"head_dim": 15}, "must be even"),
        ({"feature_layers": None}, "must name its feature_layers"),
        ({"feature_layers": 3}, "incomplete"),
        ({"feature_layers": ["1"]}, "feature_layers of a retrieval head must be a list of integers"),
        ({"head_map": [3]}, "incomplete"),
    ],
)
def test_values_of_the_wrong_kind_are_head_errors(change: dict, message: str) -> None:
    values = {"variant": "features", "hidden_size": 64, "target_hidden_size": 64, "vocab_size": 9, "heads": 2, "kv_heads": 1}
    with pytest.raises(HeadError, match=message):
        HeadConfig.from_dict(values | {"head_dim": 16, "feature_layers": [1]} | change)
