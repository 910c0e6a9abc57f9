"""Whole EAGLE-3 drafts in their dialects are pruned to heads that select what the draft's own attention would select."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specontext.errors import HeadError
from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.kernels.top_k import top_k_positions
from specontext.model_shape import ModelShape
from specontext.retrieval.checkpoint import load_head
from specontext.retrieval.draft import count_parameters, dialect_of
from specontext.retrieval.head import RetrievalHead, head_parameters
from specontext.retrieval.head_config import HeadConfig

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LAYERS = 32, 4, 2, 12, 50, 8
SINK, RECENT, CHOSEN = 2, 3, 9
TARGET = ModelShape(LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, 512, torch.float32)
LAYER_CONFIG = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def draft_tensors(layer: str = "midlayer", prefix: str = "", kv_heads: int = KV_HEADS) -> dict[str, Tensor]:
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
        f"{layer}.self_attn.k_proj.weight": random(kv_heads * HEAD_DIM, 2 * HIDDEN),
        f"{layer}.self_attn.v_proj.weight": random(kv_heads * HEAD_DIM, 2 * HIDDEN),
        f"{layer}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
        f"{layer}.mlp.gate_proj.weight": random(64, HIDDEN),
        "norm.weight": random(HIDDEN) + 1,
        "lm_head.weight": random(20, HIDDEN),
        "d2t": torch.arange(20),
        "t2d": torch.ones(VOCABULARY, dtype=torch.bool),
    }
    return {prefix + name: tensor for name, tensor in tensors.items()}


def norms(*names: str, size: int, layer: str = "") -> dict[str, Tensor]:
    """Norm weights that are not all one."""
    generator = torch.Generator().manual_seed(len(names))
    return {f"{layer}{name}.weight": torch.rand(size, generator=generator) + 0.5 for name in names}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, pickled: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def eagle(folder: Path, kv_heads: int = KV_HEADS, **changes: Any) -> Path:
    """The settings of RoPE are there and must be ignored."""
    config = LAYER_CONFIG | {"architectures": ["LlamaForCausalLM"], "rope_theta": 777.0, "rope_scaling": LLAMA3}
    return write(folder, config | {"num_key_value_heads": kv_heads} | changes, draft_tensors(kv_heads=kv_heads), pickled=True)


def eagle_safetensors(folder: Path, kv_heads: int = KV_HEADS) -> Path:
    config = {name: value for name, value in LAYER_CONFIG.items() if name != "head_dim"} | {"num_key_value_heads": kv_heads}
    return write(folder, config, draft_tensors(prefix="model.", kv_heads=kv_heads))


def specforge(folder: Path, kv_heads: int = KV_HEADS, **rope: Any) -> Path:
    config = LAYER_CONFIG | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_key_value_heads": kv_heads,
        "rope_theta": 500.0,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 5]},
    }
    embedding = {"embed_tokens.weight": torch.zeros(VOCABULARY, HIDDEN)}
    return write(folder, config | rope, draft_tensors(kv_heads=kv_heads) | embedding)


def specforge_scaled(folder: Path, kv_heads: int = KV_HEADS) -> Path:
    return specforge(folder, kv_heads, rope_scaling={"type": "linear", "factor": 3.0})


def specpv(folder: Path, kv_heads: int = KV_HEADS) -> Path:
    """Its YaRN has base 10000, whatever the config says."""
    return specforge(folder, kv_heads, rope_scaling=YARN | {"type": "yarn", "finetuned": True}, max_position_embeddings=128)


def angelslim(folder: Path, kv_heads: int = KV_HEADS) -> Path:
    config = LAYER_CONFIG | {"architectures": ["Eagle3LlamaForCausalLM"], "rope_theta": 1e6, "tie_word_embeddings": True}
    return write(
        folder,
        config | {"num_key_value_heads": kv_heads, "rope_scaling": YARN},
        draft_tensors(prefix="model.", kv_heads=kv_heads),
    )


def speculators(folder: Path, kv_heads: int = KV_HEADS, extra: dict[str, Tensor] | None = None, **rope: Any) -> Path:
    rope = rope or {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    config = {
        "speculators_model_type": "eagle3",
        "architectures": ["Eagle3Speculator"],
        "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
        "transformer_layer_config": LAYER_CONFIG | {"num_key_value_heads": kv_heads} | rope,
        "norm_before_fc": True,
    }
    embedding = {"embed_tokens.weight": torch.zeros(VOCABULARY, HIDDEN)}
    return write(folder, config, draft_tensors("layers.0", kv_heads=kv_heads) | embedding | (extra or {}))


def speculators_qwen3(folder: Path, kv_heads: int = KV_HEADS) -> Path:
    extra = norms("q_norm", "k_norm", size=HEAD_DIM, layer="layers.0.self_attn.") | norms("input_norm", size=3 * HIDDEN)
    return speculators(folder, kv_heads, extra, rope_parameters=YARN | {"rope_theta": 300.0})


def speculators_llama3(folder: Path, kv_heads: int = KV_HEADS) -> Path:
    extra = norms("fc_norm.0", "fc_norm.1", "fc_norm.2", size=HIDDEN)
    return speculators(folder, kv_heads, extra, rope_theta=200.0, rope_scaling=LLAMA3)


# dialect, RoPE that its attention uses, feature layers as inputs
CASES = [
    (eagle, {"rope_type": "default", "rope_theta": 10000.0}, (2, 4, 5)),
    (eagle_safetensors, {"rope_type": "default", "rope_theta": 10000.0}, (2, 4, 5)),
    (specforge, {"rope_type": "default", "rope_theta": 500.0}, (1, 4, 6)),
    (specforge_scaled, {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}, (1, 4, 6)),
    (specpv, YARN | {"rope_theta": 10000.0}, (1, 4, 6)),
    (angelslim, {"rope_type": "default", "rope_theta": 10000.0}, (2, 4, 5)),
    (speculators, {"rope_type": "default", "rope_theta": 500.0}, (1, 4, 6)),
    (speculators_qwen3, YARN | {"rope_theta": 300.0}, (1, 4, 6)),
    (speculators_llama3, LLAMA3 | {"rope_theta": 200.0, "original_max_position_embeddings": 64}, (1, 4, 6)),
]


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a draft, by names without prefixes."""
    pickled = folder / "pytorch_model.bin"
    tensors = torch.load(pickled) if pickled.exists() else load_file(folder / "model.safetensors")
    return {name.removeprefix("model.").removeprefix("midlayer.").removeprefix("layers.0."): t for name, t in tensors.items()}


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, positions: Tensor, rope: dict[str, Any]) -> Tensor:
    """x [T, heads, D] as Hugging Face's Llama rotates it with these parameters."""
    start = rope.get("original_max_position_embeddings", 64)
    rotary = LlamaRotaryEmbedding(LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=start, rope_parameters=dict(rope)))
    cos, sin = rotary(x, positions[None])
    return apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)


def draft_attention(folder: Path, rope: dict[str, Any], embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [T, heads, D] and keys [T, groups, D] of the draft's own attention, written down plainly."""
    own = stored(folder)
    if "input_norm.weight" in own:
        features = normed(features, own["input_norm.weight"])
    if "fc_norm.0.weight" in own:
        features = torch.cat([normed(part, own[f"fc_norm.{i}.weight"]) for i, part in enumerate(features.chunk(3, -1))], -1)
    fused = normed(features @ own["fc.weight"].T, own["hidden_norm.weight"])
    x = torch.cat((normed(embeddings, own["input_layernorm.weight"]), fused), -1)
    made = []
    for name in ("q", "k"):
        y = (x @ own[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, HEAD_DIM))
        if f"self_attn.{name}_norm.weight" in own:
            y = normed(y, own[f"self_attn.{name}_norm.weight"])
        made.append(turned(y, torch.arange(len(x)), rope))
    return made[0], made[1]


def plain_choice(queries: Tensor, keys: Tensor, start: int, stop: int, count: int) -> list[list[int]]:
    """For each group the candidates with the greatest weight at any of its query heads, for the last query."""
    groups = keys.shape[1]
    ratio = queries.shape[1] // groups
    chosen = []
    for g in range(groups):
        weights = torch.stack(
            [torch.softmax(keys[start:stop, g] @ queries[-1, h] / HEAD_DIM**0.5, 0) for h in range(g * ratio, (g + 1) * ratio)]
        )
        best = weights.amax(0).tolist()
        chosen.append(sorted(start + i for i in sorted(range(len(best)), key=lambda i: (best[i], i))[-count:]))
    return chosen


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize(("dialect", "rope", "feature_layers"), CASES)
def test_a_head_selects_what_the_draft_s_own_attention_selects(tmp_path, dialect, rope, feature_layers, kv_heads) -> None:
    folder = dialect(tmp_path / "draft", kv_heads)
    head = load_head(folder, target=replace(TARGET, kv_heads=kv_heads))
    assert head.config.feature_layers == feature_layers
    generator = torch.Generator().manual_seed(3)
    embeddings, features = torch.randn(80, HIDDEN, generator=generator), torch.randn(80, 3 * HIDDEN, generator=generator)
    features[0] = 0  # a draft sees each token's predecessor, and position 0 has none
    expected = draft_attention(folder, rope, embeddings, features)
    queries, keys = head(embeddings, features.roll(-1, 0), torch.arange(80))
    torch.testing.assert_close(queries, expected[0], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(keys, expected[1], atol=2e-4, rtol=2e-4)
    for length in (80, 41, 20):
        pages = torch.zeros((1, 1), dtype=torch.int64)  # all keys in one
        stops = torch.tensor([length - RECENT])
        scores = paged_retrieval_scores(queries[None, length - 1], keys[None], pages, SINK, stops, length)
        mine = top_k_positions(scores, CHOSEN)[0].tolist()
        assert mine == plain_choice(expected[0][:length], expected[1][:length], SINK, length - RECENT, CHOSEN)


def test_the_number_of_heads_and_a_missing_head_dim(tmp_path) -> None:
    """Here hidden_size / heads is 8 and the projections are made for 12."""
    assert load_head(eagle_safetensors(tmp_path / "draft"), target=TARGET).config.head_dim == HEAD_DIM
    assert HIDDEN // HEADS != HEAD_DIM


def test_what_is_known_of_the_draft_is_kept(tmp_path) -> None:
    expected = sum(t.numel() for name, t in draft_tensors().items() if name not in ("d2t", "t2d"))
    lengths = (
        (eagle, "EAGLE", 2048),
        (specforge, "SpecForge", 4096),
        (specpv, "SpecPV", 32768),
        (speculators, "speculators", 2048),
    )
    for dialect, name, length in lengths:
        folder = dialect(tmp_path / name)
        config = load_head(folder, target=TARGET).config
        assert config.source == f"EAGLE-3 draft {name}, {name} dialect"
        assert (config.draft_parameters, config.draft_embedding_parameters) == (expected, VOCABULARY * HIDDEN)
        assert config.trained_length == length and config.yarn
        (weights,) = (file for file in folder.iterdir() if file.name != "config.json")
        assert config.source_hash == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_draft_in_several_files_is_one_draft(tmp_path) -> None:
    tensors = draft_tensors()
    names = sorted(tensors)
    for pickled in (False, True):
        whole = load_head(write(tmp_path / f"whole{pickled}", LAYER_CONFIG, tensors, pickled=pickled), target=TARGET)
        split = tmp_path / f"split{pickled}"
        write(split, LAYER_CONFIG, {})
        (split / "model.safetensors").unlink()
        for i, part in enumerate((names[::2], names[1::2])):
            chosen = {name: tensors[name] for name in part}
            if pickled:
                torch.save(chosen, split / f"pytorch_model-0000{i}.bin")
            else:
                save_file(chosen, split / f"model-0000{i}.safetensors")
        head = load_head(split, target=TARGET)
        assert head.config.draft_parameters == whole.config.draft_parameters
        assert all(torch.equal(a, b) for a, b in zip(head.parameters(), whole.parameters(), strict=True))


def test_a_draft_with_a_shard_missing_or_scales_beside_its_weights_is_refused_by_name(tmp_path) -> None:
    folder = specforge(tmp_path / "draft")
    tensors = load_file(folder / "model.safetensors")
    scale = "midlayer.self_attn.k_proj.weight_scale"
    save_file(tensors | {scale: torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(HeadError, match=scale):
        load_head(folder, target=TARGET)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    table = {"fc.weight": "model-00001-of-00002.safetensors", scale: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(
        HeadError, match=r"download model-00002-of-00002\.safetensors, which model\.safetensors\.index\.json names"
    ):
        load_head(folder, target=TARGET)


def test_a_tensor_that_two_files_have_is_the_same_in_both(tmp_path) -> None:
    folder = specforge(tmp_path / "draft")
    tensors = load_file(folder / "model.safetensors")
    whole = load_head(folder, target=TARGET)
    save_file(tensors, folder / "copy.safetensors")
    assert load_head(folder, target=TARGET).config.draft_parameters == whole.config.draft_parameters
    save_file({"fc.weight": tensors["fc.weight"] + 1}, folder / "copy.safetensors")
    with pytest.raises(HeadError, match=r"fc\.weight is in copy\.safetensors and in model\.safetensors of .*, and differs"):
        load_head(folder, target=TARGET)
    (folder / "copy.safetensors").unlink()
    save_file(tensors | {"model.fc.weight": tensors["fc.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(HeadError, match=r"holds fc\.weight twice"):
        load_head(folder, target=TARGET)


def draft_shapes(hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> dict[str, list[int]]:
    """Tensors of a published draft, by EAGLE's names."""
    attention = {"q": [heads * head_dim, 2 * hidden], "o": [hidden, heads * head_dim]}
    attention |= {name: [kv_heads * head_dim, 2 * hidden] for name in ("k", "v")}
    mlp = {"gate": [intermediate, hidden], "up": [intermediate, hidden], "down": [hidden, intermediate]}
    shapes = {f"midlayer.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
    shapes |= {f"midlayer.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
    shapes |= {f"midlayer.{name}.weight": [hidden] for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    shapes |= {"fc.weight": [hidden, 3 * hidden], "norm.weight": [hidden], "lm_head.weight": [32000, hidden]}
    return shapes | {"d2t": [32000], "t2d": [128256]}


@pytest.mark.parametrize(("intermediate", "vocabulary", "millions"), [(14336, 128256, 424.7), (12288, 151936, 399.5)])
def test_nine_tenths_of_a_published_draft_are_pruned(intermediate: int, vocabulary: int, millions: float) -> None:
    """Drafts of Llama-3.1-8B and Qwen3-8B, by their shapes alone."""
    parameters, embedding = count_parameters(draft_shapes(4096, 32, 8, 128, intermediate))
    assert (round(parameters / 1e6, 1), embedding) == (millions, 0)
    assert count_parameters(draft_shapes(8, 2, 1, 4, 16) | {"embed_tokens.weight": [9, 8]})[1] == 72
    config = HeadConfig(
        "features",
        4096,
        4096,
        vocabulary,
        32,
        8,
        128,
        (2, 16, 29),
        draft_parameters=parameters,
        draft_embedding_parameters=vocabulary * 4096,
    )
    assert head_parameters(config) == 92_282_880
    assert head_parameters(replace(config, variant="embedding", feature_layers=())) == 20_975_616
    share, with_embeddings = (config.pruned_share(92_282_880, with_embeddings=counted) for counted in (False, True))
    assert share is not None and 0.76 < share < 0.79
    assert with_embeddings is not None and 0.9 < with_embeddings < 0.92
    assert replace(config, draft_parameters=None).pruned_share(92_282_880) is None


def test_the_embedding_variant_is_the_left_half(tmp_path) -> None:
    head = load_head(speculators_qwen3(tmp_path / "draft"), target=TARGET)
    small = head.embedding_variant()
    assert small.config.variant == "embedding" and small.config.feature_layers == () and small.config.feature_norm == "none"
    left = {"input_layernorm.weight", "q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight"}
    assert set(small.state_dict()) == left
    assert torch.equal(small.q_proj.weight, head.q_proj.weight[:, :HIDDEN])
    assert torch.equal(small.k_proj.weight, head.k_proj.weight[:, :HIDDEN])
    assert small.q_proj.weight.untyped_storage().nbytes() == HEADS * HEAD_DIM * HIDDEN * 4, "no view of the whole"
    with torch.no_grad():
        head.hidden_norm.weight.zero_()  # so the features' half adds nothing
    x, features, where = torch.randn(5, HIDDEN), torch.randn(5, 3 * HIDDEN), torch.arange(5)
    for mine, whole in zip(small(x, None, where), head(x, features, where), strict=True):
        torch.testing.assert_close(mine, whole, atol=1e-5, rtol=1e-5)


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path) -> None:
    folder = eagle(tmp_path / "draft")
    for odd in ({"fc.weight": Path("harmless")}, draft_tensors() | {"epoch": 3}, [torch.zeros(2)]):
        torch.save(odd, folder / "pytorch_model.bin")
        with pytest.raises(HeadError, match="more than tensors"):
            load_head(folder, target=TARGET)


@pytest.mark.parametrize("dialect", [eagle, specforge])
@pytest.mark.parametrize("size", [0, 3, 200, -1, -100])
def test_a_truncated_file_is_one_clear_error(tmp_path, dialect, size) -> None:
    folder = dialect(tmp_path / "draft")
    (file,) = (file for file in folder.iterdir() if file.name != "config.json")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(HeadError, match=f"{file.name} is broken"):
        load_head(folder, target=TARGET)


def test_missing_tensors_are_named(tmp_path) -> None:
    tensors = draft_tensors()
    del tensors["midlayer.hidden_norm.weight"], tensors["midlayer.self_attn.q_proj.weight"]
    with pytest.raises(HeadError, match=r"it lacks midlayer\.hidden_norm\.weight, midlayer\.self_attn\.q_proj\.weight"):
        load_head(write(tmp_path / "draft", LAYER_CONFIG, tensors), target=TARGET)


def test_no_weights_and_no_numbers(tmp_path) -> None:
    folder = eagle(tmp_path / "draft")
    tensors = draft_tensors()
    tensors["fc.weight"][3, 4] = float("nan")
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(HeadError, match=r"fc\.weight holds values that are not finite"):
        load_head(folder, target=TARGET)
    torch.save(draft_tensors() | {"fc.weight": torch.ones(HIDDEN, 3 * HIDDEN, dtype=torch.int8)}, folder / "pytorch_model.bin")
    with pytest.raises(HeadError, match=r"fc\.weight holds torch\.int8 numbers"):
        load_head(folder, target=TARGET)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(HeadError, match="no weights in"):
        load_head(folder, target=TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": 48}, "embedding width 48 .the model has 32"),
        ({"target_hidden_size": 48}, "hidden size 48 .the model has 32"),
        ({"vocab_size": 51}, "vocabulary 51 .the model has 50"),
        ({"num_key_value_heads": 4}, "4 groups and the model 2 KV heads, .*specontext head calibrate"),
        ({"num_attention_heads": 5}, "do not divide"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 7.0}, "contradicts itself"),
        ({"head_dim": 16}, "has shape"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 1, 4]}}, "not distinct"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 9]}}, "feature layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3]}}, r"fc\.weight has shape .*2 feature layers of width 32"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["1"]}}, "must be a list of integers"),
        ({"eagle_config": [1]}, "eagle_config .* must be an object"),
        ({"architectures": ["MedusaModel"]}, "unknown dialect .* MedusaModel"),
        ({"architectures": ["SomeEagleForCausalLM"]}, "unknown dialect"),
        ({"speculators_model_type": "mlp"}, "speculators draft of type mlp"),
        ({"transformer_layer_config": 3}, "transformer_layer_config .* must be an object"),
    ],
)
def test_a_draft_that_does_not_fit_says_what_does_not(tmp_path, change, message) -> None:
    folder = eagle(tmp_path / "draft")
    config = {name: value for name, value in (LAYER_CONFIG | change).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError, match=message):
        load_head(folder, target=TARGET)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "type dynamic is not supported"),
        ({"type": "longrope", "factor": 2.0}, "type longrope is not supported"),
        ({"rope_type": "mrope"}, "type mrope is not supported"),
        ({"rope_type": "llama3"}, "incomplete or wrong: 'factor'"),
        ([2.0], "rope_scaling .* must be an object"),
    ],
)
def test_rope_that_no_head_follows_is_refused_by_name(tmp_path, rope, message) -> None:
    for dialect in (specforge, speculators):
        with pytest.raises(HeadError, match=message):
            load_head(dialect(tmp_path / "draft", rope_scaling=rope), target=TARGET)


def test_a_draft_that_turns_a_share_of_each_head_is_refused(tmp_path) -> None:
    for dialect in (specforge, speculators):
        with pytest.raises(HeadError, match="RoPE turns the whole head"):
            load_head(dialect(tmp_path / "draft", partial_rotary_factor=0.5), target=TARGET)


def test_a_draft_with_other_groups_loads_where_no_head_map_is_needed(tmp_path) -> None:
    folder = eagle(tmp_path / "draft", kv_heads=4)
    assert load_head(folder, target=TARGET, need_map=False).config.kv_heads == 4
    with pytest.raises(HeadError, match="specontext head calibrate"):
        RetrievalHead.from_pretrained(folder, target=TARGET)


def test_weights_of_another_kind_are_no_draft(tmp_path) -> None:
    folder = write(tmp_path / "draft", LAYER_CONFIG, {"model.embed_tokens.weight": torch.zeros(2, 2)})
    with pytest.raises(HeadError, match=r"not an EAGLE-3 draft: it lacks fc\.weight"):
        load_head(folder, target=TARGET)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "EAGLE"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "EAGLE"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "SpecForge"),
        ({"architectures": ["Eagle3LlamaForCausalLM"]}, "AngelSlim"),
        ({"architectures": ["Eagle3DraftModel"], "transformer_layer_config": {}}, "speculators"),
    ],
)
def test_dialects_are_told_apart(values: dict[str, Any], name: str) -> None:
    assert dialect_of(values).name == name
