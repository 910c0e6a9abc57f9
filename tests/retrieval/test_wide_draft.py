"""Drafts of another width than their target, as that of Llama-3.3-70B: they bring the embedding table they were trained with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specontext import LLM, RetrievalHead, SamplingParams, SpeContextConfig
from specontext.cli.named_model import find_facts
from specontext.distill.attention import head_log_weights
from specontext.distill.draft import Draft
from specontext.distill.draft_files import save_draft
from specontext.distill.recall import candidates
from specontext.distill.student import Student
from specontext.distill.target import Target
from specontext.engine.build import facts_of_loaded
from specontext.errors import HeadError
from specontext.locations import shape_of
from specontext.memory.speed import Bandwidths, decode_floor
from specontext.model_shape import ModelShape
from specontext.retrieval.checkpoint import load_head, read_config, save_head
from specontext.retrieval.head import head_parameters

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 40, 4, 2, 16  # the target is 64 wide
DIALECTS = ("EAGLE", "SpecForge", "AngelSlim", "speculators")


def tensors_of(target: ModelShape, layer: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    return {
        "fc.weight": random(WIDTH, 3 * target.hidden_size),
        "embed_tokens.weight": random(target.vocab_size, WIDTH),
        f"{layer}.hidden_norm.weight": random(WIDTH) + 1,
        f"{layer}.input_layernorm.weight": random(WIDTH) + 1,
        f"{layer}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, 2 * WIDTH),
        f"{layer}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, 2 * WIDTH),
        "norm.weight": random(WIDTH),
        "lm_head.weight": random(20, WIDTH),
    }


def write_draft(folder: Path, dialect: str, target: ModelShape, *, table: bool = True, said: bool = True) -> Path:
    """A draft; `said` whether its config names the target's width."""
    folder.mkdir()
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    sizes |= {"head_dim": HEAD_DIM, "vocab_size": target.vocab_size}
    wide = {"target_hidden_size": target.hidden_size} if said else {}
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    tensors = tensors_of(target, "layers.0" if dialect == "speculators" else "midlayer")
    if not table:
        del tensors["embed_tokens.weight"]
    if dialect == "speculators":
        config = {"speculators_model_type": "eagle3", "transformer_layer_config": sizes, **ids, **wide}
    else:
        name = {"SpecForge": "LlamaForCausalLMEagle3", "AngelSlim": "Eagle3LlamaForCausalLM"}.get(dialect, "LlamaForCausalLM")
        counted = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
        config = {"architectures": [name], "eagle_config": counted, **sizes, **wide}
    (folder / "config.json").write_text(json.dumps(config))
    if dialect == "EAGLE":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        prefix = "model." if dialect == "AngelSlim" else ""
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def target(checkpoint: Callable[[str], Path]) -> ModelShape:
    return shape_of(checkpoint("llama"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_it_chooses_what_its_own_table_says_also_when_it_is_pruned(
    dialect: str, target: ModelShape, checkpoint: Callable[[str], Path], tmp_path: Path, prompts: list[list[int]]
) -> None:
    draft = write_draft(tmp_path / "draft", dialect, target)
    head = RetrievalHead.from_pretrained(draft, target=target)
    table = tensors_of(target, "midlayer")["embed_tokens.weight"]
    assert head.embed_tokens is not None and torch.equal(head.embed_tokens, table)
    save_head(head, tmp_path / "pruned")
    assert load_file(tmp_path / "pruned" / "model.safetensors")["embed_tokens.weight"].shape == (target.vocab_size, WIDTH)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    config = SpeContextConfig(budget=24, sink=2, recent=4, offload_layers=-1)
    outputs = []
    for source in (draft, tmp_path / "pruned"):
        llm = LLM(checkpoint("llama"), source, config, device="cpu")
        assert llm.engine.parts.head is not None and torch.equal(llm.engine.parts.head.embed_tokens, table)
        (output,) = llm.generate(prompts[2:3], params)
        assert output.stats["tokens_read_per_step"] == 24
        outputs.append(output.token_ids)
    assert outputs[0] == outputs[1]


def test_everything_is_counted(target: ModelShape, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", "SpecForge", target)
    save_head(RetrievalHead.from_pretrained(draft, target=target), tmp_path / "pruned")
    config, table = read_config(tmp_path / "pruned"), target.vocab_size * WIDTH
    size = sum(tensor.numel() for tensor in load_file(tmp_path / "pruned" / "model.safetensors").values())
    assert head_parameters(config) == size > table == config.table_parameters
    without, whole = (config.pruned_share(size, with_embeddings=counted) for counted in (False, True))
    assert config.draft_parameters == size - table + 21 * WIDTH
    assert without == pytest.approx(21 * WIDTH / config.draft_parameters)
    assert whole == pytest.approx(21 * WIDTH / (config.draft_parameters + table))
    planned = find_facts(str(checkpoint("llama")), "auto", str(tmp_path / "pruned"))
    llm = LLM(checkpoint("llama"), tmp_path / "pruned", device="cpu")
    assert facts_of_loaded(llm.engine.loaded, llm.engine.parts.head).head.parameters == planned.head.parameters == size
    assert planned.head_bytes == 4 * size == llm.engine.parts.plan.fixed["retrieval_head"]
    floor = decode_floor(planned, Bandwidths(1.0, 1.0), length=1, requests=1, offloaded=0, budget=1, overlap=0.0)
    read = planned.parameters - planned.lookup_parameters + size - table
    assert floor.device_bytes - planned.key_bytes_per_token - target.kv_bytes_per_token == 4 * read


def test_the_target_s_width_may_be_told_by_the_fusion(target: ModelShape, tmp_path: Path) -> None:
    head = RetrievalHead.from_pretrained(write_draft(tmp_path / "draft", "EAGLE", target, said=False), target=target)
    assert (head.config.hidden_size, head.config.target_hidden_size) == (WIDTH, target.hidden_size)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_without_a_table_it_is_refused(dialect: str, target: ModelShape, tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", dialect, target, table=False)
    with pytest.raises(HeadError, match=r"has width 40 and its target 64, so it needs an embedding table of its own"):
        RetrievalHead.from_pretrained(draft, target=target)


def test_a_table_of_another_vocabulary_is_refused(target: ModelShape, tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", "SpecForge", target)
    tensors = load_file(draft / "model.safetensors")
    save_file(tensors | {"embed_tokens.weight": torch.zeros(7, WIDTH)}, draft / "model.safetensors")
    with pytest.raises(HeadError, match=r"embed_tokens\.weight has shape \[7, 40\]"):
        RetrievalHead.from_pretrained(draft, target=target)


def test_the_embedding_variant_keeps_the_table(target: ModelShape, tmp_path: Path) -> None:
    head = RetrievalHead.from_pretrained(write_draft(tmp_path / "draft", "EAGLE", target), target=target)
    small = head.embedding_variant()
    assert small.embed_tokens is not None and torch.equal(small.embed_tokens, head.embed_tokens)
    save_head(small, tmp_path / "small")
    assert torch.equal(load_head(tmp_path / "small", target=target).embed_tokens, head.embed_tokens)


def test_training_uses_the_table_and_leaves_it_as_it_is(
    target: ModelShape, reference: Callable[[str], Any], tmp_path: Path
) -> None:
    head = RetrievalHead.from_pretrained(write_draft(tmp_path / "draft", "SpecForge", target), target=target)
    model = Target(reference("llama"), head.config.feature_layers)
    student = Student(head, Draft(head, intermediate_size=32)).requires_grad_(True)
    ids = torch.arange(4, 44)[None]
    seen = model.observe(ids)
    rows = torch.tensor([[30, 39]])
    far, _ = candidates(rows, 40, 2, 4)
    plain = head(head.embed_tokens[ids], seen.features, torch.arange(40))
    weights = head_log_weights(head, seen, rows, far)
    other = head(torch.zeros(1, 40, WIDTH), seen.features, torch.arange(40))
    assert weights.requires_grad and not torch.equal(plain[0], other[0])
    loss, _ = student.draft.loss(
        seen.embedded(head), seen.features, seen.hidden, model.output_matrix, torch.ones_like(ids, dtype=torch.bool), steps=2
    )
    loss.backward()
    assert not any(name.endswith("embed_tokens") for name, _ in student.named_parameters())
    save_draft(student.draft, tmp_path / "trained")
    assert torch.equal(load_head(tmp_path / "trained", target=target).embed_tokens, head.embed_tokens)
