"""`specontext head`: a draft is pruned, described, and serves a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, HEADS, HEAD_DIM, DRAFTED = 64, 4, 16, 40
TEXT = " the sun = 100. the moon = 200." * 8
KEYS = [
    "variant",
    "parameters",
    "bytes",
    "pruned_share",
    "pruned_share_with_embeddings",
    "rope_theta",
    "rope_scaling",
    "yarn",
    "trained_length",
    "feature_layers",
    "heads",
    "kv_heads",
    "key_heads",
    "key_inputs",
    "query_rank",
    "head_dim",
    "head_map",
    "source",
    "source_hash",
]
Fails = Callable[..., str]


def draft_tensors(groups: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.2).to(torch.bfloat16)

    return {
        "fc.weight": random(HIDDEN, 2 * HIDDEN),
        "midlayer.hidden_norm.weight": random(HIDDEN) + 1,
        "midlayer.input_layernorm.weight": random(HIDDEN) + 1,
        "midlayer.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": random(groups * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": random(groups * HEAD_DIM, 2 * HIDDEN),
        "midlayer.mlp.gate_proj.weight": random(512, HIDDEN),
        "lm_head.weight": random(DRAFTED, HIDDEN),
        "d2t": torch.arange(DRAFTED),
    }


WriteDraft = Callable[..., Path]


@pytest.fixture
def write_draft(tmp_path: Path, tokenizer: Any) -> WriteDraft:
    """write_draft(groups, **changes of the config): a SpecForge draft of the tiny Llama."""

    def write(groups: int = 2, **changes: Any) -> Path:
        folder = tmp_path / "draft"
        folder.mkdir(exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": groups,
            "head_dim": HEAD_DIM,
            "vocab_size": len(tokenizer),
            "rope_theta": 700.0,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]},
        }
        (folder / "config.json").write_text(json.dumps(config | changes))
        save_file(draft_tensors(groups), folder / "model.safetensors")
        return folder

    return write


def test_prune_info_generate(run: Any, tiny: Path, write_draft: WriteDraft, tmp_path: Path, tokenizer: Any) -> None:
    draft, out = write_draft(), tmp_path / "out" / "head"
    ran = run("head", "prune", draft, "--target", tiny, "-o", out, "--trained-length", 128)
    assert ran.status == 0, ran.stderr
    assert "kept input_layernorm, fc, hidden_norm, q_proj, k_proj" in ran.stdout
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}

    facts = run("head", "info", out, "--max-model-len", 512, "--json").json
    assert list(facts) == KEYS
    whole = sum(tensor.numel() for name, tensor in draft_tensors(2).items() if name != "d2t")
    kept = 64 * 128 + 64 * 128 + 32 * 128 + 2 * 64
    assert (facts["parameters"], facts["bytes"]) == (kept, 2 * kept), "in the number format of the draft"
    assert facts["pruned_share"] == pytest.approx(1 - kept / whole)
    assert facts["pruned_share_with_embeddings"] == pytest.approx(1 - kept / (whole + len(tokenizer) * HIDDEN))
    for share in ("pruned_share", "pruned_share_with_embeddings"):
        assert f"{facts[share]:.1%}" in ran.stdout
    assert facts["yarn"] == {"enabled": True, "factor": 4.0}
    assert (facts["variant"], facts["rope_theta"], facts["rope_scaling"], facts["head_map"]) == ("features", 700.0, None, None)
    assert (facts["feature_layers"], facts["trained_length"]) == ([1, 2], 128)
    assert (facts["heads"], facts["kv_heads"], facts["head_dim"]) == (HEADS, 2, HEAD_DIM)
    assert len(facts["source_hash"]) == 64 and "SpecForge" in facts["source"]

    given = ["generate", tiny, "--prompt", TEXT, "--budget", 24, "--max-tokens", 6, "--ignore-eos", "--json"]
    made, whole_draft = (run(*given, "--retrieval-head", head) for head in (out, draft))
    assert made.status == 0, made.stderr
    stats = made.json["stats"]
    assert (stats["head_rope_theta"], stats["head_yarn_factor"], stats["tokens_read_per_step"]) == (700.0, 4.0, 24)
    assert "RoPE base 700, YaRN factor 4;" in made.stderr
    assert whole_draft.json["token_ids"], "the draft serves as it is, too"
    off = run(*given, "--retrieval-head", out, "--head-yarn-factor", 1, "--head-rope-theta", 1e5)
    assert (off.json["stats"]["head_rope_theta"], off.json["stats"]["head_yarn_factor"]) == (1e5, 1.0)
    assert "head_yarn_factor=1.0" in off.stderr and "head_rope_theta=100000.0" in off.stderr


def test_the_embedding_variant(run: Any, tiny: Path, write_draft: WriteDraft, tmp_path: Path) -> None:
    draft, out = write_draft(), tmp_path / "head"
    ran = run("head", "prune", draft, "--target", tiny, "-o", out, "--variant", "embedding", "--rope-theta", 90)
    assert ran.status == 0, ran.stderr
    facts = run("head", "info", out, "--json").json
    assert (facts["variant"], facts["feature_layers"], facts["rope_theta"]) == ("embedding", [], 90.0)
    assert facts["parameters"] == 96 * HIDDEN + HIDDEN
    assert facts["yarn"] == {"enabled": True, "factor": None}
    kept = load_file(out / "model.safetensors")["midlayer.self_attn.q_proj.weight"]
    assert torch.equal(kept, draft_tensors(2)["midlayer.self_attn.q_proj.weight"][:, :HIDDEN])
    made = run("generate", tiny, "--prompt", TEXT, "--retrieval-head", out, "--budget", 24, "--max-tokens", 3, "--json")
    assert made.status == 0, made.stderr


def test_info_of_a_model_with_its_own_head(run: Any, tiny: Path) -> None:
    for source, heads in (("nano", 2), (tiny, 2), (tiny / "retrieval_head", 2)):
        facts = run("head", "info", source, "--json").json
        assert facts["kv_heads"] == heads
        assert facts["pruned_share"] is None and facts["pruned_share_with_embeddings"] is None
    assert (facts["key_heads"], facts["key_inputs"], facts["query_rank"]) == (2, "before", None)
    shown = run("head", "info", tiny, "--max-model-len", 4096).stdout
    assert "not pruned from a draft" in shown and "factor 2" in shown and "features" in shown
    assert "off" in next(line for line in run("head", "info", "nano").stdout.splitlines() if line.startswith("YaRN"))


def test_a_head_map_is_asked_for_when_the_groups_differ(
    run: Any, fails: Fails, tiny: Path, write_draft: WriteDraft, tmp_path: Path
) -> None:
    out = tmp_path / "head"
    ran = run("head", "prune", write_draft(4), "--target", tiny, "-o", out)
    assert ran.status == 0 and "4 groups and the model 2 KV heads: run `specontext head calibrate`" in ran.stderr
    assert "specontext head calibrate" in fails(["generate", tiny, "--prompt", "a", "--retrieval-head", out])


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"hidden_size": 32}, [], "embedding width 32"),
        ({"vocab_size": 7}, [], "vocabulary 7"),
        ({"architectures": ["MedusaModel"]}, [], "unknown dialect"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, [], "dynamic"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}, [], "3 feature layers of width 64"),
        ({}, ["--variant", "half"], "features, embedding"),
        ({}, ["--rope-theta", "-1"], "rope_theta"),
        ({}, ["--trained-length", "0"], "trained_length"),
        ({}, ["--target", "/no/such/model"], "/no/such/model"),
    ],
)
def test_what_cannot_be_pruned_leaves_nothing(
    fails: Fails, tiny: Path, write_draft: WriteDraft, tmp_path: Path, change: Any, options: list[str], says: str
) -> None:
    status = 1 if "--target" in options else 2  # a model that is missing, or wrong use
    words = ["head", "prune", write_draft(**change), "--target", tiny, "-o", tmp_path / "head", *options]
    assert says in fails(words, status=status)
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_broken_drafts_leave_nothing(fails: Fails, tiny: Path, write_draft: WriteDraft, tmp_path: Path) -> None:
    draft = write_draft()
    weights, words = draft / "model.safetensors", ["head", "prune", draft, "--target", tiny, "-o", tmp_path / "head"]
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "broken or truncated" in fails(words)
    tensors = draft_tensors(2)
    tensors["fc.weight"][0, 0] = float("inf")
    save_file(tensors, weights)
    assert "fc.weight holds values that are not finite" in fails(words)
    del tensors["fc.weight"]
    save_file(tensors, weights)
    assert "lacks fc.weight" in fails(words)
    (draft / "config.json").write_text("{")
    assert "config.json" in fails(words)
    assert "/no/such/draft" in fails(["head", "prune", "/no/such/draft", "--target", tiny, "-o", tmp_path / "head"])
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_draft_is_not_written_over(fails: Fails, tiny: Path, write_draft: WriteDraft) -> None:
    draft = write_draft()
    before = (draft / "config.json").read_bytes()
    assert "another directory" in fails(["head", "prune", draft, "--target", tiny, "-o", draft])
    assert (draft / "config.json").read_bytes() == before and len(list(draft.iterdir())) == 2


def test_a_head_without_features_has_none_to_keep(
    run: Any, fails: Fails, tiny: Path, write_draft: WriteDraft, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    run("head", "prune", write_draft(), "--target", tiny, "-o", small, "--variant", "embedding")
    words = ["head", "prune", small, "--target", tiny, "-o", tmp_path / "other"]
    assert "--variant embedding" in fails(words)
    assert run(*words, "--variant", "embedding").status == 0


def test_info_of_what_is_no_head(fails: Fails, write_draft: WriteDraft, tiny: Path, tmp_path: Path) -> None:
    assert "specontext head prune" in fails(["head", "info", write_draft()])
    assert "no config.json" in fails(["head", "info", tmp_path / "nothing"])
    assert "--max-model-len" in fails(["head", "info", tiny, "--max-model-len", "0"])
    (tmp_path / "config.json").write_bytes((tiny / "retrieval_head" / "config.json").read_bytes())
    assert "has no model.safetensors" in fails(["head", "info", tmp_path])
    (tmp_path / "model.safetensors").write_bytes((tiny / "retrieval_head" / "model.safetensors").read_bytes()[:-4])
    assert "broken or truncated" in fails(["head", "info", tmp_path])


@pytest.mark.parametrize(("option", "value"), [("--head-rope-theta", "0"), ("--head-yarn-factor", "0.5")])
def test_wrong_rope_options(fails: Fails, tiny: Path, option: str, value: str) -> None:
    assert option[2:].replace("-", "_") in fails(["generate", tiny, "--prompt", "a", option, value])


def test_the_command_line_does_not_load_torch_to_say_what_it_can() -> None:
    code = "import sys, specontext.cli.head; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
