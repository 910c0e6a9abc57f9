"""Calibration: the map finds the groups that a head was built to have, and theta the base that it was rotated with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specontext.distill.calibration import calibrate
from specontext.distill.recall import measure
from specontext.distill.target import Target
from specontext.errors import ConfigError, HeadError
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig
from specontext.retrieval.head_map import band_map, best_map, with_map

LENGTH, GROUPS, DIM, HIDDEN = 80, 2, 16, 32


def target_of(layers: int = 1, theta: float = 10000.0) -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=GROUPS,
        num_key_value_heads=GROUPS,
        head_dim=DIM,
        max_position_embeddings=LENGTH,
        initializer_range=0.4,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    return Target(LlamaForCausalLM(config), ())


def copy_of_first_layer(target: Target, order: list[int], theta: float = 10000.0) -> RetrievalHead:
    """An embedding head whose group g is head order[g] of the target's first layer: it selects just what that head attends to."""
    groups = len(order)
    config = HeadConfig("embedding", HIDDEN, HIDDEN, 64, groups, groups, DIM, rope_theta=theta, rms_norm_eps=1e-6)
    head = RetrievalHead(config)
    attention = target.model.model.layers[0].self_attn
    with torch.no_grad():
        for mine, theirs in ((head.q_proj, attention.q_proj), (head.k_proj, attention.k_proj)):
            mine.weight.copy_(torch.cat([theirs.weight[g * DIM : (g + 1) * DIM] for g in order]))
        head.input_layernorm.weight.copy_(target.model.model.layers[0].input_layernorm.weight)
    return head.eval().requires_grad_(False)


def batches() -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    wanted = (torch.arange(LENGTH) >= 40) & (torch.arange(LENGTH) < LENGTH - 1)
    return [(ids, wanted.expand(2, -1))]


SETTINGS = {"queries": 30, "sink": 1, "recent": 2}


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1, 0, 1], [0]])
def test_the_map_finds_the_groups_that_copy_each_head(order: list[int]) -> None:
    target = target_of()
    head = copy_of_first_layer(target, order)
    [found] = calibrate(head, target, batches(), 12, **SETTINGS)
    assert found.coverage.shape == (1, GROUPS, len(order))
    if len(order) == 1:
        assert found.head_map == ((0, 0),)
        return
    assert found.head_map == ((order.index(0), order.index(1)),)
    assert (found.identity_recall is None) == (len(order) != GROUPS)
    mapped = measure(with_map(head, found.head_map), target, batches(), [12], **SETTINGS)[12]
    assert mapped["head"] == pytest.approx(mapped["layer"], abs=1e-6)  # it selects what the layer itself would
    assert mapped["head"] == pytest.approx(found.recall, abs=1e-6)


def test_theta_is_chosen_by_recall_and_the_head_is_left_as_it_was() -> None:
    target = target_of(theta=200.0)
    head = copy_of_first_layer(target, [0, 1], theta=10000.0)
    before = head.inverse_frequencies.clone()
    found = calibrate(head, target, batches(), 12, thetas=(10000.0, 200.0, 5e5), **SETTINGS)
    best = max(found, key=lambda result: result.recall)
    assert best.theta == 200.0
    assert [result.theta for result in found] == [10000.0, 200.0, 5e5]
    assert torch.equal(head.inverse_frequencies, before) and head.rope_theta == 10000.0


def test_ties_keep_the_heads_own_number() -> None:
    coverage = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.2], [0.3, 0.2]]])
    assert best_map(coverage) == ((0, 1), (1, 0))


def test_bands_are_neighbouring_layers() -> None:
    assert band_map(5, 2, 3) == ((0, 3), (0, 3), (1, 4), (1, 4), (2, 5))
    assert band_map(2, 3, 1) == ((0, 1, 2),) * 2
    for bands in (0, 3):
        with pytest.raises(HeadError, match=f"2 layers do not divide into {bands} bands"):
            band_map(2, 3, bands)


def test_a_head_with_another_map_has_its_own_rope() -> None:
    head = copy_of_first_layer(target_of(), [0, 1])
    other = with_map(head, ((1, 0),))
    other.set_rope(theta=7.0)
    assert head.config.head_map is None and other.config == replace(head.config, head_map=((1, 0),))
    assert not torch.equal(head.inverse_frequencies, other.inverse_frequencies)
    assert other.q_proj.weight is head.q_proj.weight


@pytest.mark.parametrize("budget", [-1, 0, 2, 3])
def test_a_budget_of_sinks_and_recent_tokens_alone_is_refused(budget: int) -> None:
    target = target_of()
    head = copy_of_first_layer(target, [0, 1])
    with pytest.raises(ConfigError, match=f"budget of {budget} has no room beside 1 sinks and 2 recent"):
        calibrate(head, target, batches(), budget, **SETTINGS)
    with pytest.raises(ConfigError, match="no room"):
        measure(head, target, batches(), [budget], **SETTINGS)
    assert calibrate(head, target, batches(), 4, **SETTINGS)[0].recall > 0
