"""Whole EAGLE-3 drafts in their dialects are pruned to the head that a plain reading of the draft gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from specontext.core import ModelShape
from specontext.retrieval.checkpoint import load_head
from specontext.retrieval.head import HeadError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LAYERS = 32, 4, 2, 12, 50, 8
TARGET = ModelShape(LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, 512, torch.float32)
LAYER_CONFIG = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
}


def draft_tensors(layer: str = "midlayer", prefix: str = "") -> dict[str, Tensor]:
    """A complete draft: the pruned parts must be left out."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    tensors = {
        "fc.weight": random(HIDDEN, 3 * HIDDEN),
        f"{layer}.hidden_norm.weight": random(HIDDEN) + 1,
        f"{layer}.input_layernorm.weight": random(HIDDEN) + 1,
        f"{layer}.post_attention_layernorm.weight": random(HIDDEN) + 1,
        f"{layer}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, 2 * HIDDEN),
        f"{layer}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        f"{layer}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        f"{layer}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
        f"{layer}.mlp.gate_proj.weight": random(64, HIDDEN),
        "norm.weight": random(HIDDEN) + 1,
        "lm_head.weight": random(20, HIDDEN),
        "d2t": torch.arange(20),
        "t2d": torch.ones(VOCABULARY, dtype=torch.bool),
    }
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, pickled: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def eagle(folder: Path, **changes: Any) -> Path:
    return write(folder, LAYER_CONFIG | {"architectures": ["LlamaForCausalLM"]} | changes, draft_tensors(), pickled=True)


def specforge(folder: Path) -> Path:
    config = LAYER_CONFIG | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "rope_theta": 500.0,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
    }
    return write(folder, config, draft_tensors() | {"embed_tokens.weight": torch.zeros(VOCABULARY, HIDDEN)})


def angelslim(folder: Path) -> Path:
    config = LAYER_CONFIG | {"architectures": ["Eagle3LlamaForCausalLM"], "rope_theta": 1e6, "tie_word_embeddings": True}
    return write(folder, config, draft_tensors(prefix="model."))


def speculators(folder: Path) -> Path:
    config = {
        "speculators_model_type": "eagle3",
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "transformer_layer_config": LAYER_CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "norm_before_fc": True,
    }
    generator = torch.Generator().manual_seed(1)
    extra = {
        "input_norm.weight": torch.rand(3 * HIDDEN, generator=generator) + 0.5,
        "layers.0.self_attn.q_norm.weight": torch.rand(HEAD_DIM, generator=generator) + 0.5,
        "layers.0.self_attn.k_norm.weight": torch.rand(HEAD_DIM, generator=generator) + 0.5,
    }
    return write(folder, config, draft_tensors("layers.0") | extra)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE by complex multiplication of the pairs (i, i + D/2)."""
    angles = positions[:, None] * theta ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    pairs = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((pairs.real, pairs.imag), -1)


@pytest.mark.parametrize(
    ("dialect", "layer", "theta", "feature_layers"),
    [
        (eagle, "midlayer", 10000.0, (2, 4, 5)),
        (specforge, "midlayer", 500.0, (2, 4, 5)),
        (angelslim, "midlayer", 10000.0, (2, 4, 5)),
        (speculators, "layers.0", 500.0, (2, 4, 5)),
    ],
)
def test_a_draft_of_every_dialect_gives_its_own_queries_and_keys(tmp_path, dialect, layer, theta, feature_layers) -> None:
    folder = dialect(tmp_path / "draft")
    head = load_head(folder, target=TARGET)
    assert head.config.feature_layers == feature_layers
    tensors = draft_tensors(layer)
    embeddings, features, positions = torch.randn(7, HIDDEN), torch.randn(7, 3 * HIDDEN), torch.arange(3, 10)
    fused = features
    if dialect is speculators:
        fused = normed(features, torch.rand(3 * HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5)
    fused = normed(fused @ tensors["fc.weight"].T, tensors[f"{layer}.hidden_norm.weight"])
    x = torch.cat((normed(embeddings, tensors[f"{layer}.input_layernorm.weight"]), fused), -1)
    expected = []
    for name in ("q", "k"):
        y = (x @ tensors[f"{layer}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, HEAD_DIM))
        if head.config.qk_norm:
            y = normed(y, getattr(head, f"{name}_norm").weight)
        expected.append(turned(y, positions, theta))
    for ours, theirs in zip(head(embeddings, features, positions), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-4, rtol=2e-4)
    assert head.config.qk_norm == (dialect is speculators)


def test_norms_of_each_feature_layer_are_applied(tmp_path) -> None:
    tensors = draft_tensors() | {f"fc_norm.{i}.weight": torch.full((HIDDEN,), float(i + 1)) for i in range(3)}
    head = load_head(write(tmp_path / "draft", LAYER_CONFIG, tensors), target=TARGET)
    assert head.config.feature_norm == "each"
    features = torch.randn(2, 3 * HIDDEN)
    scaled = torch.cat([normed(part, torch.full((HIDDEN,), i + 1.0)) for i, part in enumerate(features.chunk(3, -1))], -1)
    plain = load_head(write(tmp_path / "plain", LAYER_CONFIG, draft_tensors()), target=TARGET)
    where = torch.arange(2)
    torch.testing.assert_close(head(features[:, :HIDDEN], features, where), plain(features[:, :HIDDEN], scaled, where))


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path) -> None:
    folder = eagle(tmp_path / "draft")
    torch.save({"fc.weight": Path("harmless")}, folder / "pytorch_model.bin")
    with pytest.raises(HeadError, match="more than tensors"):
        load_head(folder, target=TARGET)


def test_a_truncated_pickle_is_one_clear_error(tmp_path) -> None:
    file = eagle(tmp_path / "draft") / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(HeadError, match="broken"):
        load_head(file.parent, target=TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"vocab_size": 51}, "vocabulary 51 .the model has 50"),
        ({"num_key_value_heads": 4}, "KV heads 4 .the model has 2"),
        ({"head_dim": 16}, "has shape"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 1, 4]}}, "not distinct"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 9]}}, "feature layers"),
    ],
)
def test_a_draft_that_does_not_fit_says_what_does_not(tmp_path, change, message) -> None:
    folder = eagle(tmp_path / "draft")
    config = {name: value for name, value in (LAYER_CONFIG | change).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError, match=message):
        load_head(folder, target=TARGET)


def test_scaled_rope_is_refused_by_name(tmp_path) -> None:
    folder = speculators(tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"]["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError, match="llama3"):
        load_head(folder, target=TARGET)


def test_weights_of_another_kind_are_no_draft(tmp_path) -> None:
    folder = write(tmp_path / "draft", LAYER_CONFIG, {"model.embed_tokens.weight": torch.zeros(2, 2)})
    with pytest.raises(HeadError, match=r"not an EAGLE-3 draft: it lacks fc\.weight"):
        load_head(folder, target=TARGET)
