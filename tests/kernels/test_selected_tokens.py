"""The sets that a step reads, in Triton and in PyTorch, against what is said of them, place by place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specontext.kernels import top_k as dispatched
from specontext.kernels.dispatch import reference_of
from specontext.kernels.top_k import ALWAYS
from specontext.kernels.triton import top_k as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
Select = Callable[..., tuple[Tensor, Tensor]]
EACH = pytest.mark.parametrize(
    "select", [kernels.selected_tokens, reference_of(dispatched.selected_tokens)], ids=["triton", "torch"]
)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a set."""
    monkeypatch.setattr(kernels, "PLACES", 8)


def expected(scored: list[int], length: int, end: int | None, sink: int, width: int, whole: int) -> tuple[list[int], list[bool]]:
    """One set."""
    end = max(length - width, sink) if end is None else end
    if whole and length <= whole:
        last = [*range(max(end - len(scored), sink), end)]
        scored = last + [-1] * (len(scored) - len(last))
    fixed = [[t if t < length else -1 for t in part] for part in (range(sink), range(end, end + width))]
    return fixed[0] + scored + fixed[1], [False] * sink + [t >= 0 for t in scored] + [False] * width


def check(select: Select, scored: Tensor, lengths: list[int], ends: list[int] | None, sink: int, width: int, whole: int) -> None:
    given_ends = None if ends is None else torch.tensor(ends, device=DEVICE)
    tokens, by_score = select(
        scored.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int64, device=DEVICE),
        given_ends,
        sink=sink,
        width=width,
        whole=whole,
    )
    assert tokens.dtype == torch.int64 and by_score.dtype == torch.bool
    for row, length in enumerate(lengths):
        for group in range(scored.shape[1]):
            end = None if ends is None else ends[row]
            right = expected(scored[row, group].tolist(), length, end, sink, width, whole)
            assert (tokens[row, group].tolist(), by_score[row, group].tolist()) == right


@EACH
@QUICK
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    groups=st.integers(1, 3),
    sizes=st.tuples(st.integers(0, 5), st.integers(0, 19), st.integers(0, 6)),
    whole=st.sampled_from([0, 0, 9, 25, ALWAYS]),
    data=st.data(),
)
def test_every_place_holds_what_is_said(
    select: Select, lengths: list[int], groups: int, sizes: tuple[int, int, int], whole: int, data: st.DataObject
) -> None:
    sink, count, width = sizes
    ends = None
    if data.draw(st.booleans()):
        ends = [max(sink, data.draw(st.integers(0, max(0, length)))) for length in lengths]
    rows = []
    for _ in range(len(lengths) * groups):
        chosen = sorted(data.draw(st.sets(st.integers(sink, sink + 60), max_size=count)))
        rows.append(chosen + [-1] * (count - len(chosen)))
    scored = torch.tensor(rows, dtype=torch.int64).view(len(lengths), groups, count)
    check(select, scored, lengths, ends, sink, width, whole)


@EACH
def test_sets_that_lie_otherwise_in_memory(select: Select) -> None:
    scored = torch.tensor([[[3, 5, -1], [4, 6, 7]], [[9, -1, -1], [3, 4, 5]]])
    check(select, scored.transpose(0, 1), [30, 12], None, 3, 2, 12)
    check(select, scored[:, :1].expand(-1, 4, -1), [30, 31], [20, 25], 3, 4, 0)
    check(select, torch.zeros((), dtype=torch.int64).expand(2, 2, 17), [30, 11], None, 3, 2, ALWAYS)
    check(select, scored[:0], [], None, 3, 2, 0)


@EACH
def test_far_positions(select: Select) -> None:
    far = 3 << 31
    check(select, torch.tensor([[[far - 9, far - 7, -1]]]), [far], None, 2, 4, 7)
