"""Whole drafts: the unrolled loss is that of drafting literally from every position; files keep everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specontext.distill.draft import Draft, frequent_tokens
from specontext.distill.draft_files import NAMES, save_draft
from specontext.errors import HeadError, SpeContextError
from specontext.model_shape import ModelShape
from specontext.retrieval.checkpoint import load_head, save_head
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig

HIDDEN, HEADS, GROUPS, HEAD_DIM, VOCABULARY, INTERMEDIATE = 32, 4, 2, 12, 40, 48
SEQUENCES, LENGTH = 2, 11
KNOWN = torch.tensor([0, 2, 3, 5, 8, 9, 13, 14, 15, 21, 22, 23, 24, 25, 30, 31, 32, 33, 36, 39])
TARGET = ModelShape(5, HIDDEN, HEADS, GROUPS, HEAD_DIM, VOCABULARY, 512, torch.float32)


def make_head(**changes: Any) -> RetrievalHead:
    torch.manual_seed(1)
    values = {"feature_layers": (1, 2, 4), "rope_theta": 500.0, "rms_norm_eps": 1e-5} | changes
    return RetrievalHead(HeadConfig("features", HIDDEN, HIDDEN, VOCABULARY, HEADS, GROUPS, HEAD_DIM, **values))


def make_draft(vocabulary: Tensor | None = KNOWN, **changes: Any) -> Draft:
    """A draft whose weights are all random, norms too, and large enough that attention is not flat."""
    draft = Draft(make_head(**changes), intermediate_size=INTERMEDIATE, vocabulary=vocabulary)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.2) + (parameter.ndim == 1))
    return draft


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    features = random(SEQUENCES, LENGTH, 3 * HIDDEN)
    wanted = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.8
    wanted[1, 8:] = False  # the second sequence is padded
    return {
        "embeddings": random(SEQUENCES, LENGTH, HIDDEN),
        "features": features,
        "teacher_hidden": random(SEQUENCES, LENGTH, HIDDEN),
        "output_matrix": random(VOCABULARY, HIDDEN) * 0.4,
        "wanted": wanted,
    }


class Plain:
    """An EAGLE-3 draft as it drafts: one start, one step, one query at a time, in float64."""

    def __init__(self, draft: Draft) -> None:
        self.weights = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
        self.config, self.vocabulary = draft.head.config, draft.vocabulary

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.config.rms_norm_eps
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]

    def times(self, x: Tensor, name: str) -> Tensor:
        return self.weights[f"{name}.weight"] @ x

    def rope(self, x: Tensor, position: int) -> Tensor:
        """RoPE by complex multiplication of the pairs (i, i + D/2)."""
        angles = position * self.config.rope_theta ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), -1)

    def fused(self, features: Tensor) -> Tensor:
        c = self.config
        if c.feature_norm == "joint":
            features = self.norm(features, "head.feature_norm")
        elif c.feature_norm == "each":
            parts = enumerate(features.chunk(3))
            features = torch.cat([self.norm(part, f"head.feature_norms.{i}") for i, part in parts])
        return self.times(features, "head.fc")

    def read(self, embedding: Tensor, fused: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query [Hq, D], key and value [G, D] of one token."""
        x = torch.cat((self.norm(embedding, "head.input_layernorm"), self.norm(fused, "head.hidden_norm")))
        query, key = (self.times(x, f"head.{name}_proj").unflatten(0, (-1, HEAD_DIM)) for name in "qk")
        if self.config.qk_norm:
            query, key = self.norm(query, "head.q_norm"), self.norm(key, "head.k_norm")
        return self.rope(query, position), self.rope(key, position), self.times(x, "v_proj").unflatten(0, (-1, HEAD_DIM))

    def layer(self, query: Tensor, keys: list[Tensor], values: list[Tensor], fused: Tensor) -> Tensor:
        heads = []
        for h in range(HEADS):
            group = h // (HEADS // GROUPS)
            weights = torch.stack([key[group] @ query[h] for key in keys]).div(HEAD_DIM**0.5).softmax(0)
            heads.append(sum(weight * value[group] for weight, value in zip(weights, values, strict=True)))
        hidden = fused + self.times(torch.cat(heads), "o_proj")
        x = self.norm(hidden, "post_attention_layernorm")
        return hidden + self.times(F.silu(self.times(x, "gate_proj")) * self.times(x, "up_proj"), "down_proj")

    def draft(self, embeddings: Tensor, features: Tensor, start: int, steps: int) -> list[Tensor]:
        """Hidden states of the steps of one draft over embeddings [S, H] and each token's own features [S, F * H]."""
        true = [self.read(embeddings[t], self.fused(features[t - 1]), t) for t in range(1, start + 1)]
        keys, values = [key for _, key, _ in true], [value for _, _, value in true]
        hidden = [self.layer(true[-1][0], keys, values, self.fused(features[start - 1]))]
        for position in range(start + 1, min(start + steps, len(embeddings))):
            query, key, value = self.read(embeddings[position], hidden[-1], position)
            keys.append(key)
            values.append(value)
            hidden.append(self.layer(query, keys, values, hidden[-1]))
        return hidden

    def unroll(self, batch: dict[str, Tensor], steps: int) -> Tensor:
        """[steps, N, S, H], zero where no draft is."""
        out = [[[torch.zeros(HIDDEN).double()] * LENGTH for _ in range(SEQUENCES)] for _ in range(steps)]
        for n in range(SEQUENCES):
            for start in range(1, LENGTH):
                drafted = self.draft(batch["embeddings"][n].double(), batch["features"][n].double(), start, steps)
                for step, hidden in enumerate(drafted):
                    out[step][n][start + step] = hidden
        return torch.stack([torch.stack([torch.stack(row) for row in step]) for step in out])

    def loss(self, batch: dict[str, Tensor], steps: int, decay: float) -> tuple[Tensor, list[float]]:
        unrolled, total, agreement = self.unroll(batch, steps), torch.zeros(()).double(), []
        teacher = batch["teacher_hidden"].double() @ batch["output_matrix"].double().T
        for step in range(steps):
            losses, hits, asked = [], 0, 0
            for n, t in batch["wanted"].nonzero().tolist():
                if t <= step:
                    continue
                asked += 1
                top = int(teacher[n, t].argmax())
                if top not in self.vocabulary.tolist():
                    continue
                logits = self.times(self.norm(unrolled[step, n, t], "norm"), "lm_head")
                losses.append(-(teacher[n, t, self.vocabulary].softmax(0) * logits.log_softmax(0)).sum())
                hits += int(self.vocabulary[logits.argmax()]) == top
            total = total + decay**step * torch.stack(losses).mean()
            agreement.append(hits / asked)
        return total, agreement


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("changes", [{}, {"feature_norm": "joint", "qk_norm": True}, {"feature_norm": "each"}])
def test_unrolled_steps_are_those_of_drafting_from_every_position(changes) -> None:
    draft, batch = make_draft(**changes), make_batch()
    ours = torch.stack(draft.unroll(batch["embeddings"], batch["features"], 4))
    close(ours, Plain(draft).unroll(batch, 4))
    for step in range(4):
        assert not ours[step, :, : step + 1].any() and ours[step, :, step + 1 :].any(-1).all()


@pytest.mark.parametrize("vocabulary", [None, KNOWN])
@pytest.mark.parametrize("steps", [1, 3])
def test_loss_agreement_and_gradients_are_those_of_plain_drafting(vocabulary, steps) -> None:
    draft, batch = make_draft(vocabulary), make_batch()
    plain = Plain(draft)
    loss, agreement = draft.loss(**batch, steps=steps, decay=0.7)
    expected, expected_agreement = plain.loss(batch, steps, 0.7)
    close(loss, expected)
    assert agreement == pytest.approx(expected_agreement)
    loss.backward()
    expected.backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        close(parameter.grad, plain.weights[name].grad)


def test_what_is_held_at_once_does_not_change_the_result() -> None:
    whole, parts, batch = make_draft(), make_draft(), make_batch()
    parts.tile_elements, parts.chunk_elements = 3 * SEQUENCES * HEADS * LENGTH, 2 * 3 * len(KNOWN)
    losses = [draft.loss(**batch, steps=3) for draft in (whole, parts)]
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert losses[0][1] == losses[1][1]
    for loss, _ in losses:
        loss.backward()
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_position_0_is_neither_key_nor_query_and_padding_is_not_seen() -> None:
    draft, batch = make_draft(), make_batch()
    before, _ = draft.loss(**batch, steps=3)
    batch["embeddings"][:, 0] = 7
    batch["features"][:, -1] = -3
    batch["wanted"][:, 0] = ~batch["wanted"][:, 0]
    for name in ("embeddings", "features", "teacher_hidden"):
        batch[name][1, 8:] = 5
    after, _ = draft.loss(**batch, steps=3)
    assert torch.equal(before, after)


def test_positions_whose_top_token_the_draft_cannot_say_are_misses_without_loss() -> None:
    draft, batch = make_draft(torch.tensor([3, 4])), make_batch()
    tops = (batch["teacher_hidden"] @ batch["output_matrix"].T).argmax(-1)
    batch["wanted"] = (tops != 3) & (tops != 4)
    loss, agreement = draft.loss(**batch, steps=2)
    loss.backward()
    assert loss.item() == 0 and agreement == [0, 0]
    assert not any(parameter.grad.any() for parameter in draft.parameters() if parameter.grad is not None)
    loss, agreement = draft.loss(**batch | {"wanted": torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)}, steps=2)
    assert loss.item() == 0 and agreement == [0, 0]


def test_more_steps_than_tokens_add_nothing() -> None:
    draft, batch = make_draft(), make_batch()
    batch = {name: tensor[:, :3] if name != "output_matrix" else tensor for name, tensor in batch.items()}
    batch["wanted"] = torch.ones(SEQUENCES, 3, dtype=torch.bool)
    few, many = draft.loss(**batch, steps=2), draft.loss(**batch, steps=5)
    torch.testing.assert_close(few[0], many[0])
    assert len(many[1]) == 5 and many[1][2:] == [0, 0, 0]
    with pytest.raises(SpeContextError, match="at least one"):
        draft.unroll(batch["embeddings"], batch["features"], 0)


def test_half_precision_comes_near_and_keeps_loss_and_gradients_in_float32() -> None:
    draft, batch = make_draft(), make_batch()
    expected, _ = draft.loss(**batch, steps=3)
    low = {name: tensor if name == "wanted" else tensor.bfloat16() for name, tensor in batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = [draft.loss(**tensors, steps=3)[0] for tensors in (batch, low)]
    for loss in losses:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
        loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in draft.parameters())
    mixed, _ = draft.loss(**low, steps=3)  # a bfloat16 target under a float32 draft
    torch.testing.assert_close(mixed, expected, rtol=0.05, atol=0.05)


def test_the_head_is_shared_and_the_output_matrix_is_copied() -> None:
    head, matrix = make_head(), torch.randn(VOCABULARY, HIDDEN)
    draft = Draft(head, intermediate_size=INTERMEDIATE, vocabulary=KNOWN, lm_head=matrix)
    parameters = {id(parameter) for parameter in draft.parameters()}
    assert all(id(parameter) in parameters for parameter in head.parameters())
    assert torch.equal(draft.lm_head.weight, matrix[KNOWN])
    before = head.q_proj.weight.detach().clone()
    optimizer = torch.optim.SGD(draft.parameters(), 0.1)
    draft.loss(**make_batch(), steps=2)[0].backward()
    optimizer.step()
    assert not torch.equal(head.q_proj.weight, before)


def test_frequent_tokens_are_ascending_and_ties_go_to_lower_ids() -> None:
    assert frequent_tokens(torch.tensor([1, 7, 0, 1, 9, 1]), 4).tolist() == [0, 1, 3, 4]
    assert frequent_tokens(torch.zeros(3), 3).tolist() == [0, 1, 2]
    with pytest.raises(SpeContextError, match="from 1 to 3"):
        frequent_tokens(torch.zeros(3), 4)


@pytest.mark.parametrize(
    "vocabulary", [KNOWN.flip(0), torch.tensor([1, 1]), torch.tensor([5, VOCABULARY]), KNOWN.float(), KNOWN[:0], KNOWN[None]]
)
def test_a_vocabulary_that_is_not_ascending_ids_is_refused(vocabulary) -> None:
    with pytest.raises(HeadError, match="ascending"):
        Draft(make_head(), intermediate_size=INTERMEDIATE, vocabulary=vocabulary)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(HeadError, match="output matrix"):
        Draft(make_head(), intermediate_size=INTERMEDIATE, lm_head=torch.zeros(VOCABULARY, HIDDEN + 1))
    with pytest.raises(HeadError, match="'features' head"):
        Draft(make_head().embedding_variant(), intermediate_size=INTERMEDIATE)
    for odd in ({"key_heads": 1}, {"key_inputs": "around"}, {"query_rank": 3}):
        with pytest.raises(HeadError, match=f"leave out {next(iter(odd))}"):
            Draft(make_head(**odd), intermediate_size=INTERMEDIATE)


def test_training_raises_agreement_with_a_tiny_llama() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(VOCABULARY, (4, 24))
    with torch.no_grad():
        out = model.model(ids, output_hidden_states=True)
    features = torch.cat([out.hidden_states[layer] for layer in (1, 2, 4)], -1)
    matrix = model.lm_head.weight
    draft = Draft(make_head(), intermediate_size=INTERMEDIATE, lm_head=matrix)
    optimizer = torch.optim.AdamW(draft.parameters(), 5e-3)
    history = []
    for _ in range(60):
        loss, agreement = draft.loss(
            model.model.embed_tokens(ids), features, out.last_hidden_state, matrix, torch.ones(4, 24, dtype=torch.bool), steps=3
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((loss.item(), agreement))
    assert history[-1][0] < 0.8 * history[0][0]
    for before, after in zip(history[0][1], history[-1][1], strict=True):
        assert before < 0.2 and after > 0.6


def test_a_draft_is_stored_whole_and_prunes_to_its_head(tmp_path: Path) -> None:
    draft = make_draft()
    save_draft(draft, tmp_path / "draft")
    head, stored = load_head(tmp_path / "draft", target=TARGET), load_file(tmp_path / "draft" / "model.safetensors")
    assert head.config.feature_layers == (1, 2, 4)
    assert head.config.rope_theta == 500.0 and head.config.rms_norm_eps == 1e-5
    state = draft.state_dict()
    assert all(torch.equal(state[name], stored[theirs]) for name, theirs in NAMES.items())
    for name, tensor in draft.head.state_dict().items():
        assert torch.equal(tensor, head.state_dict()[name]), name
    save_draft(make_draft(None), tmp_path / "draft")
    every = load_file(tmp_path / "draft" / "model.safetensors")
    assert not every["d2t"].any() and every["t2d"].all() and len(every["t2d"]) == VOCABULARY
    assert sorted(file.name for file in (tmp_path / "draft").iterdir()) == ["config.json", "model.safetensors"]


def test_files_are_those_of_eagle_3(tmp_path: Path) -> None:
    save_draft(make_draft(), tmp_path, max_position_embeddings=4096, dtype=torch.bfloat16)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    layer, wide = "midlayer", 2 * HIDDEN
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        f"{layer}.self_attn.q_proj.weight": [HEADS * HEAD_DIM, wide],
        f"{layer}.self_attn.k_proj.weight": [GROUPS * HEAD_DIM, wide],
        f"{layer}.self_attn.v_proj.weight": [GROUPS * HEAD_DIM, wide],
        f"{layer}.self_attn.o_proj.weight": [HIDDEN, HEADS * HEAD_DIM],
        f"{layer}.hidden_norm.weight": [HIDDEN],
        f"{layer}.input_layernorm.weight": [HIDDEN],
        f"{layer}.post_attention_layernorm.weight": [HIDDEN],
        f"{layer}.mlp.gate_proj.weight": [INTERMEDIATE, HIDDEN],
        f"{layer}.mlp.up_proj.weight": [INTERMEDIATE, HIDDEN],
        f"{layer}.mlp.down_proj.weight": [HIDDEN, INTERMEDIATE],
        "fc.weight": [HIDDEN, 3 * HIDDEN],
        "norm.weight": [HIDDEN],
        "lm_head.weight": [len(KNOWN), HIDDEN],
        "d2t": [len(KNOWN)],
        "t2d": [VOCABULARY],
    }
    assert torch.equal(tensors["d2t"] + torch.arange(len(KNOWN)), KNOWN) and tensors["d2t"].dtype == torch.int64
    assert torch.equal(tensors["t2d"].nonzero().flatten(), KNOWN) and tensors["t2d"].dtype == torch.bool
    assert tensors["fc.weight"].dtype == torch.bfloat16 and config["torch_dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == len(KNOWN)
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3]
    assert (config["rope_theta"], config["max_position_embeddings"], config["head_dim"]) == (500.0, 4096, HEAD_DIM)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feature_norm": "joint"}, "feature_norm 'joint'"),
        ({"qk_norm": True}, "qk_norm"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"head_map": ((0, 0),) * 5}, "a head_map"),
        ({"feature_layers": (0, 2, 4)}, "feature layers"),
        ({"feature_layers": (2, 4)}, "feature layers"),
    ],
)
def test_a_form_that_the_dialect_cannot_express_is_refused(tmp_path: Path, changes, reason) -> None:
    with pytest.raises(HeadError, match=reason):
        save_draft(make_draft(**changes), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_what_cannot_be_saved_leaves_what_was_there(tmp_path: Path) -> None:
    draft = make_draft()
    save_draft(draft, tmp_path / "draft")
    before = (tmp_path / "draft" / "model.safetensors").read_bytes()
    with torch.no_grad():
        draft.norm.weight[0] = torch.nan
    with pytest.raises(HeadError, match=r"norm\.weight holds values that are not finite"):
        save_draft(draft, tmp_path / "draft")
    assert (tmp_path / "draft" / "model.safetensors").read_bytes() == before
    save_head(make_head(), tmp_path / "head")
    with pytest.raises(HeadError, match="another directory"):
        save_draft(make_draft(), tmp_path / "head")
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadError, match="cannot be written"):
        save_draft(make_draft(), tmp_path / "file" / "draft")
