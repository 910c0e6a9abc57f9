"""Slot plans of the Triton kernels against the reference: the same slots, misses and tables, step after step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from specontext.kernels import slot_plan
from specontext.kernels.dispatch import reference_of
from specontext.kernels.triton.slot_plan import plan_slots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
Tables = tuple[Tensor, Tensor, Tensor]


def empty_tables(seats: int, groups: int, span: int, slots: int) -> Tables:
    """slot_of_token, token_of_slot and last_used."""
    absent = torch.full((seats, groups, span), -1, dtype=torch.int32, device=DEVICE)
    empty = torch.full((seats, groups, slots), -1, dtype=torch.int32, device=DEVICE)
    return absent, empty, torch.zeros_like(empty)


def plan_both(tokens: Tensor, seats: Tensor, ours: Tables, theirs: Tables, step: int) -> tuple[Tensor, Tensor]:
    """Plan with the reference and with the kernel, and compare all that they return and change."""
    tokens, seats = tokens.to(DEVICE), seats.to(DEVICE)
    number = torch.tensor(step, dtype=torch.int32, device=DEVICE)
    expected = reference_of(slot_plan.plan_slots)(tokens, seats, *theirs, number if step % 2 else step)
    planned = plan_slots(tokens, seats, *ours, step if step % 2 else number)
    for found, wanted in zip((*planned, *ours), (*expected, *theirs), strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    return planned


def check_inverse(slot_of_token: Tensor, token_of_slot: Tensor) -> None:
    seat, group, slot = (token_of_slot >= 0).nonzero(as_tuple=True)
    assert (slot_of_token[seat, group, token_of_slot[seat, group, slot].long()] == slot).all()
    assert (slot_of_token >= 0).sum() == len(slot)


def choose(requests: int, groups: int, width: int, span: int, generator: torch.Generator) -> Tensor:
    """Distinct tokens with gaps."""
    tokens = torch.rand(requests, groups, span, generator=generator).argsort(-1)[..., :width]
    return torch.where(torch.rand(tokens.shape, generator=generator) < 0.15, -1, tokens)


@QUICK
@given(st.data(), st.integers(1, 9), st.integers(0, 4), st.sampled_from([1, 2, 3]), st.integers(0, 2**31))
def test_any_sequence_of_selections_is_planned_as_the_reference_does(
    data: st.DataObject, width: int, spare: int, groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    seats, span, slots = 3, 14, width + spare
    ours, theirs = empty_tables(seats, groups, span, slots), empty_tables(seats, groups, span, slots)
    for step in range(1, data.draw(st.integers(1, 6)) + 1):
        chosen = data.draw(st.lists(st.integers(0, seats - 1), min_size=1, max_size=seats, unique=True))
        tokens = choose(len(chosen), groups, width, span, generator)
        planned, _ = plan_both(tokens, torch.tensor(chosen), ours, theirs, step)
        check_inverse(*ours[:2])
        held = ours[1][torch.tensor(chosen, device=DEVICE)].long().gather(-1, planned.clamp(min=0))
        assert torch.equal(torch.where(planned >= 0, held, -1).cpu(), tokens)


@pytest.mark.parametrize(
    ("requests", "groups", "width", "slots", "span"),
    [(2, 1, 300, 300, 650), (1, 2, 257, 391, 513), (1, 1, 40, 1100, 1500), (1, 1, 1030, 1031, 1100)],
    ids=["no spare slots", "blocks of entries", "blocks of slots", "blocks of lists"],
)
def test_plans_of_several_blocks(requests: int, groups: int, width: int, slots: int, span: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = empty_tables(3, groups, span, slots), empty_tables(3, groups, span, slots)
    seats = torch.tensor([2, 0])[:requests]
    tokens = choose(requests, groups, width, span, generator)
    for step in range(1, 4):
        fresh = choose(requests, groups, width, span, generator)
        kept = torch.rand(tokens.shape, generator=generator) < 0.7
        clash = (fresh[..., :, None] == torch.where(kept, tokens, -2)[..., None, :]).any(-1)
        tokens = torch.where(kept, tokens, torch.where(clash, -1, fresh))
        _, missing = plan_both(tokens, seats, ours, theirs, 1000 * step)
        assert missing.any() and (step == 1 or (~missing & (tokens.to(DEVICE) >= 0)).any())
    check_inverse(*ours[:2])


def test_nothing_selected_changes_nothing() -> None:
    ours, theirs = empty_tables(2, 2, 10, 4), empty_tables(2, 2, 10, 4)
    plan_both(torch.tensor([[[3, 7], [-1, 9]]]), torch.tensor([1]), ours, theirs, 1)
    before = [table.clone() for table in ours]
    # Rows of a padded batch may share a seat, as long as they select nothing.
    slots, missing = plan_both(torch.full((3, 2, 2), -1), torch.tensor([1, 0, 1]), ours, theirs, 2)
    assert (slots == -1).all() and not missing.any()
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
    slots, missing = plan_both(torch.zeros((0, 2, 3), dtype=torch.int64), torch.zeros(0, dtype=torch.int64), ours, theirs, 3)
    assert slots.shape == missing.shape == (0, 2, 3)


def test_slots_are_taken_in_order_of_last_use_and_number() -> None:
    ours, theirs = empty_tables(1, 1, 20, 6), empty_tables(1, 1, 20, 6)
    seat = torch.tensor([0])
    for step, tokens in enumerate(([1, 2, 3], [4, 5, 6], [3, 5, 1]), start=1):
        slots, _ = plan_both(torch.tensor([[tokens]]), seat, ours, theirs, step)
    assert slots.flatten().tolist() == [2, 4, 0]
    slots, missing = plan_both(torch.tensor([[[10, 3, 11, -1, 12]]]), seat, ours, theirs, 4)
    assert slots.flatten().tolist() == [1, 2, 3, -1, 5]  # used in steps 1, 2 and 2
    assert missing.flatten().tolist() == [True, False, True, False, True]
