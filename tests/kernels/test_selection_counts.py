"""What is counted of selections, in Triton and in PyTorch, step after step against sets of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specontext.kernels import slot_plan as dispatched
from specontext.kernels.dispatch import reference_of
from specontext.kernels.slot_plan import NOTHING
from specontext.kernels.top_k import selected_tokens
from specontext.kernels.triton import slot_plan as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
ROW_BYTES = 48
Count = Callable[..., None]
EACH = pytest.mark.parametrize(
    "count", [kernels.count_selection, reference_of(dispatched.count_selection)], ids=["triton", "torch"]
)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of a program, and several programs a row."""
    monkeypatch.setattr(kernels, "BLOCK", 8)


class Counted:
    """Counters of some seats, and beside them what sets of tokens say that these have to be."""

    def __init__(self, count: Count, seats: int, groups: int, kept: int, readers: Tensor, sink: int) -> None:
        self.count, self.readers, self.sink, self.kept = count, readers.to(DEVICE), sink, kept
        # As the engine has them: some columns of a wider table.
        self.table = torch.zeros((seats, 7), dtype=torch.float64, device=DEVICE)
        self.before = torch.full((seats, groups, kept), NOTHING, dtype=torch.int32, device=DEVICE)
        self.expected = numpy.zeros((seats, 5))
        self.sets: list[list[list[int]]] = [[[] for _ in range(groups)] for _ in range(seats)]

    def step(self, seats: list[int], tokens: Tensor, scored: Tensor, missing: Tensor | None, resident: list[bool]) -> None:
        self.count(
            self.table[:, 2:],
            self.before,
            torch.tensor(seats, dtype=torch.int64, device=DEVICE),
            tokens.to(DEVICE),
            scored.to(DEVICE),
            missing if missing is None else missing.to(DEVICE),
            self.readers,
            torch.tensor(resident, device=DEVICE),
            sink=self.sink,
            row_bytes=ROW_BYTES,
        )
        for row, seat in enumerate(seats):
            lost = None if missing is None else missing[row].tolist()
            self._expect(seat, tokens[row].tolist(), scored[row].tolist(), lost, resident)
        assert not self.table[:, :2].any(), "nothing else is touched"
        assert self.table[:, 2:].tolist() == self.expected.tolist()
        rows = [[chosen + [NOTHING] * (self.kept - len(chosen)) for chosen in sets] for sets in self.sets]
        assert self.before.tolist() == rows

    def _expect(
        self, seat: int, tokens: list[list[int]], scored: list[list[bool]], missing: list[list[bool]] | None, resident: list[bool]
    ) -> None:
        read = loaded = again = total = 0
        then, now = self.sets[seat], [[] for _ in self.sets[seat]]  # type: list[list[int]], list[list[int]]
        for group, row in enumerate(tokens):
            readers = self.readers[:, group].tolist()
            read += sum(token >= 0 for token in row) * sum(readers)
            if missing is not None:
                loaded += sum(missing[group]) * sum(n for n, here in zip(readers, resident, strict=True) if not here)
            chosen = [token for token, flag in zip(row, scored[group], strict=True) if flag]
            total += len(chosen)
            now[group] = chosen[: self.kept]
            again += len({*now[group]} & {*then[group]})
        both = any(then[: len(tokens)]) and total > 0
        share = float(numpy.float32(again) / numpy.float32(total)) if both else 0.0
        self.expected[seat] += (read, read - loaded, loaded * ROW_BYTES, share, both)
        self.sets[seat] = now


def selection(chosen: list[list[list[int]]], size: int, lengths: list[int], sink: int, width: int) -> tuple[Tensor, Tensor]:
    """Sinks, chosen tokens, padded to `size`, and the last tokens."""
    rows = [[row + [-1] * (size - len(row)) for row in groups] for groups in chosen]
    scored = torch.tensor(rows, dtype=torch.int64).view(len(chosen), -1, size)
    return selected_tokens(scored, torch.tensor(lengths, dtype=torch.int64), None, sink=sink, width=width)


@EACH
@QUICK
@given(
    groups=st.integers(1, 3),
    fewer=st.booleans(),
    layers=st.integers(1, 3),
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 19), st.integers(0, 4)),
    spare=st.integers(-3, 3),
    data=st.data(),
)
def test_any_sequence_of_steps_is_counted_as_sets_say(
    count: Count, groups: int, fewer: bool, layers: int, sizes: tuple[int, int, int], spare: int, data: st.DataObject
) -> None:
    sink, most, recent = sizes
    kept = max(most, sink + most + recent + spare)  # of a wider selection, or of a narrower one
    readers = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=layers * groups, max_size=layers * groups)))
    counted = Counted(count, 4, groups, kept, readers.view(layers, groups), sink)
    for _ in range(data.draw(st.integers(1, 4))):
        seats = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
        used = 1 if fewer else groups
        size = data.draw(st.integers(1, most))
        one = st.lists(st.integers(sink, sink + 24), max_size=size, unique=True).map(sorted)
        chosen = [[data.draw(one) for _ in range(used)] for _ in seats]
        lengths = [data.draw(st.integers(0, 40)) if not any(sets) else sink + 25 + recent for sets in chosen]
        tokens, scored = selection(chosen, size, lengths, sink, recent)
        missing = None
        if data.draw(st.booleans()):
            missing = (tokens >= 0) & (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(len(seats))) < 0.4)
        counted.step(seats, tokens, scored, missing, data.draw(st.lists(st.booleans(), min_size=layers, max_size=layers)))


@EACH
def test_long_selections(count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 1024)
    generator = torch.Generator().manual_seed(0)
    counted = Counted(count, 3, 3, 2048, torch.tensor([[4, 0, 4], [1, 6, 1]]), 4)
    for _ in range(3):
        order = torch.rand(2, 3, 5000, generator=generator).argsort(-1)
        rows = (order[..., :1980].sort(-1).values + 4).tolist()
        tokens, scored = selection(rows, 2000, [6000, 5900], 4, 44)
        counted.step([2, 0], tokens, scored, torch.rand(tokens.shape, generator=generator) < 0.3, [False, True])
    assert 0.3 < counted.expected[2, 3] / 2 < 0.5, "1,980 of 5,000 tokens, twice"


@EACH
def test_shares_are_rounded_once_more_than_float64(count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were when float32 was what two numbers of tokens made."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    counted = Counted(count, 1, 1, 200, torch.ones((1, 1), dtype=torch.int64), 0)
    for total in range(3, 200, 7):
        for again in (total - 1, total // 3):
            counted.step([0], *selection([[[*range(total)]]], 200, [900], 0, 1), None, [True])
            rows = [[[*range(again), *range(300, 300 + total - again)]]]
            counted.step([0], *selection(rows, 200, [900], 0, 1), None, [True])


@EACH
def test_padding_that_shares_a_seat_counts_nothing(count: Count) -> None:
    counted = Counted(count, 3, 2, 9, torch.tensor([[2, 2]]), 2)
    for first in (5, 6):
        rows = [[[first, 7], [first]], [[], []], [[], []]]
        counted.step([0, 2, 2], *selection(rows, 4, [30, 0, 0], 2, 3), None, [True])
    assert counted.expected[0].tolist() == [52, 52, 0, float(numpy.float32(1) / numpy.float32(3)), 1]
    assert not counted.expected[2].any()


@EACH
def test_rows_that_share_a_seat_are_all_counted(count: Count) -> None:
    """Whatever becomes of the share: that of padding is nobody's."""
    counted = Counted(count, 2, 1, 9, torch.tensor([[3]]), 0)
    tokens, scored = selection([[[1, 2]], [[1, 2]], [[1, 2]]], 4, [30, 30, 30], 0, 2)
    counted.step([1, 1, 1], tokens, torch.zeros_like(scored), tokens >= 0, [False])
    assert counted.expected[1].tolist() == [36, 0, 36 * ROW_BYTES, 0, 0]


@EACH
def test_no_requests(count: Count) -> None:
    counted = Counted(count, 2, 1, 9, torch.tensor([[3]]), 1)
    nothing = torch.empty((0, 1, 5), dtype=torch.int64)
    counted.step([], nothing, nothing.bool(), None, [False])


@EACH
def test_where_layers_live_is_read_when_a_step_runs(count: Count) -> None:
    """A captured step has the tensors of one that ran before."""
    readers, resident = torch.tensor([[1], [5]], device=DEVICE), torch.tensor([False, False], device=DEVICE)
    counts = torch.zeros((1, 5), dtype=torch.float64, device=DEVICE)
    before = torch.full((1, 1, 4), NOTHING, dtype=torch.int32, device=DEVICE)
    tokens, scored = (x.to(DEVICE) for x in selection([[[3, 4, 5]]], 3, [30], 0, 1))
    seats, missing = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones_like(scored)
    bytes_loaded = []
    for here in ([False, False], [False, True], [True, True]):
        resident.copy_(torch.tensor(here))
        count(counts, before, seats, tokens, scored, missing, readers, resident, sink=0, row_bytes=10)
        bytes_loaded.append(counts[0, 2].item())
    assert bytes_loaded == [240, 280, 280]
