"""Rows that are run again: against the whole model under masks, and gates' gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from specontext.distill.effects import grouped, selection_loss, straight_through, token_effects
from specontext.distill.queries import candidates
from specontext.distill.replay import Replay, divergence, log_odds, sampled
from specontext.distill.target import Target
from specontext.kernels.top_k import top_k_positions
from specontext.layer_sizes import Window
from specontext.model_shape import ModelShape

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "windows", "sinks", "chunks", "shared", "delta", "conv", "latents")
LENGTH = 24
MaskedForward = Callable[..., Any]


@pytest.fixture(scope="module")
def target_of(checkpoint: Callable[[str], Path]) -> Callable[..., Target]:
    def target(family: str, dtype: torch.dtype = torch.float32) -> Target:
        return Target(AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=dtype), (1,))

    return target


def some_ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(5))


def random_gates(layers: int, heads: int, rows: Tensor, seed: int = 0) -> list[Tensor]:
    """Of each layer what its KV heads read of a half of the tokens and the row's own, bool [N, Hkv, Q, S]."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(LENGTH) == rows[:, None, :, None]
    return [(torch.rand(len(rows), heads, rows.shape[1], LENGTH, generator=generator) < 0.5) | own for _ in range(layers)]


def windows_of(shape: ModelShape) -> tuple[Window | None, ...]:
    """Of all layers of the decoder."""
    return tuple(shape.places[layer].window if layer in shape.places else None for layer in range(shape.depth))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chained", [False, True])
def test_replayed_rows_are_the_models_own_under_a_mask(
    target_of: Callable[..., Target],
    reference: Callable[[str], PreTrainedModel],
    masked_forward: MaskedForward,
    family: str,
    chained: bool,
) -> None:
    """A chain is one pass with several sparse rows; rows that stand alone are one pass each."""
    target, ids, model = target_of(family), some_ids(1), reference(family)
    rows = torch.arange(17, 23)[None] if chained else torch.tensor([[21, 3, 9, 9, 0, 17]])
    gates = random_gates(target.layers, target.groups, rows)
    replay = Replay(target, target.observe(ids, keep=True), rows, chained)
    with torch.no_grad():
        found = target.logits(replay.hidden(lambda layer: gates[layer])[0])
        everything = target.logits(replay.hidden()[0])
    token = torch.arange(LENGTH)
    causal = (token <= token[:, None]).expand(target.query_heads, -1, -1)
    shape = ModelShape.from_config(model.config)
    own = [causal if window is None else causal & (token >= window.first(token)[:, None]) for window in windows_of(shape)]
    dense = masked_forward(model, ids[0].tolist(), own).logits[0]
    torch.testing.assert_close(everything, dense[rows[0]], rtol=1e-3, atol=1e-3)
    together = [list(range(6))] if chained else [[number] for number in range(6)]
    for numbers in together:
        masks = [mask.clone() for mask in own]
        for layer, place in shape.places.items():
            if place.window is not None:
                continue
            gate = gates[place.layer]
            for number in numbers:
                row = int(rows[0, number])
                masks[layer][:, row] &= gate[0, :, number].repeat_interleave(target.query_heads // target.groups, 0)
        expected = masked_forward(model, ids[0].tolist(), masks).logits[0]
        torch.testing.assert_close(found[numbers], expected[rows[0, numbers]], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, everything, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "conv"])
def test_effects_are_what_leaving_a_little_of_a_token_out_does(target_of: Callable[..., Target], family: str) -> None:
    """One gate for a token in all layers and KV heads of a group, by central differences."""
    target = target_of(family, torch.float64)
    head_map = tuple(tuple(int(layer > 0) * (head + 1) for head in range(target.groups)) for layer in range(target.layers))
    groups = target.groups + 2  # of which one is read by nobody
    rows, real = torch.tensor([[20, 7], [23, 12]]), torch.tensor([[True, True], [True, False]])
    seen = target.observe(some_ids(), keep=True)
    replay = Replay(target, seen, rows)
    chance = torch.tensor([[0.3, 0.9], [0.5, 0.1]], dtype=torch.float64)
    effects, hidden = token_effects(replay, head_map, groups, real, chance)
    torch.testing.assert_close(hidden, torch.stack([seen.hidden[n, rows[n]] for n in range(2)]), rtol=1e-5, atol=1e-5)
    said = sampled(target, hidden, chance)
    assert effects.shape == (2, groups, 2, LENGTH) and not effects[:, -1].any() and not effects[1, :, 1].any()
    assert not effects[0, :, 1, 8:].any()  # what comes after a row
    close = 5 if family == "conv" else 1  # with more layers
    step = 3e-3  # norms are computed in float32, whatever the weights are
    for n, group, row, token in [(0, 0, 0, 5), (0, 1, 0, 0), (0, 2, 0, 20), (1, 0, 0, 22), (1, 1, 0, 11), (0, 1, 1, 3)]:
        ends = []
        for change in (step, -step):
            gates = torch.ones(2, groups, 2, LENGTH, dtype=torch.float64)
            gates[n, group, row, token] += change
            with torch.no_grad():
                ends.append(log_odds(target, replay.hidden(grouped(gates, head_map)), said)[n, row])
        expected = (ends[0] - ends[1]).abs() / (2 * step)
        assert effects[n, group, row, token].item() == pytest.approx(expected.item(), rel=2e-3 * close, abs=1e-5 * close)


def test_half_the_squared_effect_is_what_a_small_change_costs(target_of: Callable[..., Target]) -> None:
    """Its mean over the model's own tokens is the Fisher information of a gate."""
    target, rows = target_of("llama", torch.float64), torch.tensor([[20]])
    replay = Replay(target, target.observe(some_ids(1), keep=True), rows)
    head_map = (tuple(range(target.groups)),) * target.layers
    gates, step = torch.ones(1, target.groups, 1, LENGTH, dtype=torch.float64), 0.02
    gates[..., 6] -= step
    with torch.no_grad():
        dense, changed = replay.hidden(), replay.hidden(grouped(gates, head_map))
        cost = divergence(target, changed, dense).item()
        probabilities = target.logits(dense[0]).softmax(-1)[0]
        moved = target.logits(changed[0]).log_softmax(-1) - target.logits(dense[0]).log_softmax(-1)
    assert cost == pytest.approx(0.5 * (probabilities * moved[0].square()).sum().item(), rel=0.1)
    assert cost > 0


def test_effects_do_not_vanish_where_the_model_is_sure(target_of: Callable[..., Target]) -> None:
    """With logits twenty times as great one token has all the probability, and its odds hang on the same tokens as before."""
    head_map, real = ((0, 1),) * 3, torch.ones(1, 1, dtype=torch.bool)
    found = []
    for factor in (1.0, 20.0):
        target = target_of("llama")
        target.model.get_output_embeddings().weight.mul_(factor)
        seen = target.observe(some_ids(1), keep=True)
        row = int(target.logits(seen.hidden[0, 8:]).softmax(-1).amax(-1).argmax()) + 8  # the one that is the surest
        replay = Replay(target, seen, torch.tensor([[row]]))
        effects, hidden = token_effects(replay, head_map, 2, real, torch.tensor([[0.5]]))
        said = sampled(target, hidden, torch.tensor([[0.5]]))
        found.append((effects[0, :, 0], log_odds(target, hidden, said).item()))
    (plain, unsure), (sharp, sure) = found
    assert unsure < 0 and sure > 12  # where log p is flat
    assert sharp.amax() > 5 * plain.amax()


def test_sampling_follows_the_distribution(target_of: Callable[..., Target]) -> None:
    target = target_of("llama")
    hidden = target.observe(some_ids(1)).hidden[:, :1].expand(1, 2000, -1)
    said = sampled(target, hidden, (torch.arange(2000) + 0.5)[None] / 2000)
    shares = said[0].bincount(minlength=target.output_matrix.shape[0]) / 2000
    torch.testing.assert_close(shares, target.logits(hidden[0, :1]).softmax(-1)[0], atol=6e-4, rtol=0)


def test_straight_through_is_the_engines_selection_with_a_soft_edge() -> None:
    rows = torch.tensor([[20, 3, 15]])
    far, always = candidates(rows, LENGTH, 2, 3)
    weights = torch.randn(1, 2, 3, LENGTH, generator=torch.Generator().manual_seed(1)).masked_fill(~far, -1e30)
    weights = weights.log_softmax(-1).requires_grad_()
    gates = straight_through(weights, far, always, 4, 0.5)
    for group in range(2):
        for number, row in enumerate(rows[0].tolist()):
            scores = torch.where(far[0, 0, number], weights[0, group, number].exp(), -1.0)
            chosen = top_k_positions(scores, 4)
            expected = {0, 1, *range(max(row - 2, 0), row + 1), *chosen[chosen >= 0].tolist()} & set(range(row + 1))
            assert gates[0, group, number].nonzero().flatten().tolist() == sorted(expected)
    assert gates.unique().tolist() == [0.0, 1.0]
    [slopes] = torch.autograd.grad(gates[0, 0, 0, 7] - gates[0, 0, 0, 9], weights)
    edge = weights[0, 0, 0][(gates[0, 0, 0] > 0) & far[0, 0, 0]].min()
    soft = torch.sigmoid((weights[0, 0, 0] - edge) / 0.5)
    expected_slopes = soft * (1 - soft) / 0.5
    assert slopes[0, 0, 0, 7].item() == pytest.approx(expected_slopes[7].item(), rel=1e-4)
    assert slopes[0, 0, 0, 9].item() == pytest.approx(-expected_slopes[9].item(), rel=1e-4)


def test_the_selection_loss_teaches_to_read_what_was_missing(target_of: Callable[..., Target]) -> None:
    """Its slope says which tokens to take in: raising them by it lowers the loss of the next selection."""
    target, rows = target_of("llama"), torch.tensor([[23, 20], [19, 22]])
    head_map, real = (tuple(range(target.groups)),) * target.layers, torch.ones(2, 2, dtype=torch.bool)
    replay = Replay(target, target.observe(some_ids(), keep=True), rows)
    far, always = candidates(rows, LENGTH, 1, 2)
    weights = torch.zeros(2, target.groups, 2, LENGTH).masked_fill(~far, -1e30).requires_grad_()
    with torch.no_grad():
        dense = replay.hidden()
    losses = []
    for _ in range(12):
        gates = straight_through(weights, far, always, 5, 1.0)
        loss = selection_loss(replay, head_map, gates, dense, real, highest=100.0)
        [slope] = torch.autograd.grad(loss, weights)
        assert slope.isfinite().all() and not slope[~far.expand_as(slope)].any()
        losses.append(loss.item())
        weights = (weights - 2.0 * slope / slope.abs().amax()).detach().requires_grad_()
    assert min(losses[-3:]) < 0.7 * losses[0]


def test_nothing_of_the_model_is_changed_and_nothing_is_kept_unasked(target_of: Callable[..., Target]) -> None:
    target, rows = target_of("llama"), torch.tensor([[20]])
    layers = list(target.model.model.layers)
    before = target.model.config._attn_implementation
    seen = target.observe(some_ids(1), rows, lambda layer, weights: None)
    assert seen.stored == ()
    seen = target.observe(some_ids(1), keep=True)
    assert len(seen.stored) == target.layers
    token_effects(Replay(target, seen, rows), ((0, 1),) * target.layers, 2, torch.ones(1, 1).bool(), torch.full((1, 1), 0.5))
    assert target.model.config._attn_implementation == before
    assert all("forward" not in layer.__dict__ for layer in layers)


def test_gradients_hold_one_layer_s_rows_at_a_time(target_of: Callable[..., Target]) -> None:
    """What the forward pass saves for the backward pass has no number for each pair of row and token and layer."""
    target, length, queries = target_of("llama"), 400, 8
    rows = torch.arange(300, 300 + queries)[None]
    seen = target.observe(some_ids(1, length), keep=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    gates = torch.ones(1, 2, queries, length, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Replay(target, seen, rows).hidden(grouped(gates, ((0, 1),) * target.layers))
    assert max(saved, default=0) < queries * length
