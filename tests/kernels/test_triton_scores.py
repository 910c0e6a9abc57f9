"""Scores of retrieval keys, in Triton and in PyTorch, against float64: odd shapes, formats, pages, and who else is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext.kernels import retrieval_scores as dispatched
from specontext.kernels.dispatch import reference_of
from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.kernels.triton import retrieval_scores as kernels
from specontext.memory.pages import PageAllocator
from specontext.retrieval.methods.speculative import KeyCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
paged_retrieval_scores_reference = reference_of(paged_retrieval_scores)
FORMATS = [torch.float32, torch.float16, torch.bfloat16]
# R, G, Hq / G, S, D
SHAPES = [(1, 1, 1, 1, 64), (2, 2, 3, 141, 80), (3, 1, 16, 100, 96), (2, 3, 2, 333, 128), (1, 2, 5, 70, 256), (1, 1, 24, 40, 24)]

# R, K, G / K, Hq / G, S, D: few keys that many queries read, wide ones among them
SHARED = [
    *[(1, 1, 9, 3, 300, 512), (2, 1, 15, 3, 141, 320), (3, 3, 3, 1, 129, 264), (1, 1, 24, 4, 131, 1024)],
    *[(2, 2, 20, 7, 40, 40), (1, 1, 3, 2, 200, 96)],
]

Paged = Callable[..., Tensor]
BOTH = [kernels.paged_retrieval_scores, paged_retrieval_scores_reference]
PAGED = pytest.mark.parametrize("paged", BOTH, ids=["triton", "torch"])

# The interpreter computes with what masked places of an uninitialised buffer hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks, merges and tiles also in short rows."""
    monkeypatch.setattr(kernels, "CHUNK", 128)
    monkeypatch.setattr(kernels, "PARTS", 2)
    monkeypatch.setattr(dispatched, "TILE_BYTES", 1 << 14)
    yield


def rand(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact_scores(query: Tensor, keys: Tensor, start: int, stops: list[int], groups: int | None = None) -> Tensor:
    """The definition in float64, with query [R, Hq, D] and keys [R, S, K, D]."""
    requests, span, key_heads, dim = keys.shape
    groups = groups or key_heads
    ratio = query.shape[1] // groups
    scores = torch.full((requests, groups, span), -1.0, dtype=torch.float64)
    for r, stop in enumerate(stops):
        seen = keys[r, start:stop].cpu().double()
        for g in range(groups):
            if start < stop:
                logits = (
                    query[r, g * ratio : (g + 1) * ratio].cpu().double() @ seen[:, g * key_heads // groups].T / math.sqrt(dim)
                )
                scores[r, g, start:stop] = torch.softmax(logits, -1).amax(0)
    return scores


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=1e-9)


def in_pages(keys: Tensor, page_size: int, index: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys [R, S, G, D] spread over pages in random order; what no key fills is not a number."""
    requests, span = keys.shape[:2]
    count = -(-span // page_size)
    pool = keys.new_full((requests * count + 3, page_size, *keys.shape[2:]), torch.nan)
    table = torch.randperm(len(pool), generator=torch.Generator().manual_seed(5))[: requests * count].view(requests, count)
    for r in range(requests):
        for p in range(count):
            part = keys[r, p * page_size : (p + 1) * page_size]
            pool[table[r, p], : len(part)] = part
    return pool, table.to(DEVICE, index)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("requests", "groups", "ratio", "span", "dim"), SHAPES)
def test_scores(requests: int, groups: int, ratio: int, span: int, dim: int, dtype: torch.dtype) -> None:
    query = rand(requests, groups * ratio, dim, dtype=dtype, seed=0)
    keys = rand(requests, span, groups, dim, dtype=dtype, seed=1)
    start = min(4, span - 1)
    stops = [span, span // 2, start][:requests]  # the last of three has no candidate
    expected = exact_scores(query, keys, start, stops)
    pool, table = in_pages(keys, 16, torch.int64)
    for paged in BOTH:
        close(paged(query, pool, table, start, torch.tensor(stops, device=DEVICE), span), expected)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("requests", "key_heads", "each", "ratio", "span", "dim"), SHARED)
def test_groups_that_share_a_key(
    requests: int, key_heads: int, each: int, ratio: int, span: int, dim: int, dtype: torch.dtype
) -> None:
    groups = key_heads * each
    query = rand(requests, groups * ratio, dim, dtype=dtype, seed=0)
    keys = rand(requests, span, key_heads, dim, dtype=dtype, seed=1)
    stops = [span, span // 2, 4][:requests]
    expected = exact_scores(query, keys, 4, stops, groups)
    pool, table = in_pages(keys, 12, torch.int64)
    at = torch.tensor(stops, device=DEVICE)
    for paged in BOTH:
        close(paged(query, pool, table, 4, at, span, groups), expected)


@PAGED
@pytest.mark.parametrize(
    ("page_size", "index", "dtype"),
    [
        (1, torch.int64, torch.float32),
        (7, torch.int32, torch.bfloat16),
        (16, torch.int64, torch.bfloat16),
        (64, torch.int32, torch.float16),
    ],
)
def test_pages_are_read_in_place(page_size: int, index: torch.dtype, dtype: torch.dtype, paged: Paged) -> None:
    query, keys = rand(3, 6, 48, dtype=dtype, seed=0), rand(3, 290, 2, 48, dtype=dtype, seed=1)
    pool, table = in_pages(keys, page_size, index)
    stops = [290, 133, 2]
    scores = paged(query, pool, table, 3, torch.tensor(stops, device=DEVICE), 290)
    close(scores, exact_scores(query, keys, 3, stops))


@PAGED
@pytest.mark.parametrize(("key_heads", "dim"), [(2, 32), (1, 272)])
@pytest.mark.parametrize("reserved", [0, 3, 250])
def test_what_is_chosen_in_any_case_does_not_compete(key_heads: int, dim: int, reserved: int, paged: Paged) -> None:
    query, keys = (rand(3, *shape, dim, dtype=torch.float32, seed=1) for shape in ((key_heads * 4,), (290, key_heads)))
    rank = torch.zeros(3, 290, key_heads, dtype=torch.uint8)
    rank[:, torch.randperm(290, generator=torch.Generator().manual_seed(3))[:250]] = torch.arange(1, 251, dtype=torch.uint8)[
        :, None
    ]
    rank[0, :, 0] = 0  # nothing of one head
    rank[2, :133] = 1  # nothing is left to compete, unless nothing is reserved
    pool, table = in_pages(keys, 16, torch.int64)
    ranks = torch.full((len(pool), 16, key_heads), 9, dtype=torch.uint8)
    for r in range(3):
        for p in range(table.shape[1]):
            part = rank[r, p * 16 : (p + 1) * 16]
            ranks[table[r, p], : len(part)] = part
    stops, scale = [290, 141, 133], 0.3
    at = torch.tensor(stops, device=DEVICE)
    scores = paged(query, pool, table, 2, at, 290, key_heads * 2, scale, ranks.to(DEVICE), reserved).cpu()
    for r, stop in enumerate(stops):
        for g in range(key_heads * 2):
            closed = (rank[r, :, g // 2] > 0) & (rank[r, :, g // 2] <= reserved)
            inside = torch.zeros(290, dtype=torch.bool)
            inside[2:stop] = True
            logits = query[r, g * 2 : g * 2 + 2].cpu().double() @ keys[r, :, g // 2].cpu().double().T * scale
            weights = torch.softmax(logits.masked_fill(closed | ~inside, -torch.inf), -1).nan_to_num(0.0).amax(0)
            expected = weights.masked_fill(closed, torch.inf).masked_fill(~inside, -1.0)
            close(scores[r, g], expected)


@PAGED
@pytest.mark.parametrize(("key_heads", "dim"), [(2, 32), (1, 272)])
def test_neither_company_nor_span_changes_a_number(key_heads: int, dim: int, paged: Paged) -> None:
    if DEVICE == "cuda" and paged is paged_retrieval_scores_reference:
        pytest.skip("on a GPU the reference multiplies the keys of the whole span")
    query, keys = (rand(3, *shape, dim, dtype=torch.float32, seed=1) for shape in ((8,), (600, key_heads)))
    pool, table = in_pages(keys, 16, torch.int64)
    stops = torch.tensor([203, 600, 37], device=DEVICE)
    together = paged(query, pool, table, 2, stops, 600, 2)
    for r, stop in enumerate(stops.tolist()):
        for span in (stop, min(stop + 50, 600)):
            one = slice(r, r + 1)
            alone = paged(query[one], pool, table[one, : -(-span // 16)], 2, stops[one], span, 2)
            assert torch.equal(alone[0], together[r, :, :span])


@PAGED
def test_stops_beyond_the_span_and_before_the_start(paged: Paged) -> None:
    query, keys = rand(3, 2, 16, dtype=torch.float32, seed=0), rand(3, 40, 1, 16, dtype=torch.float32, seed=1)
    pool, table = in_pages(keys, 8, torch.int64)
    scores = paged(query, pool, table, 5, torch.tensor([99, 4, 0], device=DEVICE), 21)
    close(scores, exact_scores(query, keys[:, :21], 5, [21, 4, 0]))


@PAGED
def test_what_is_not_a_candidate_may_hold_anything(paged: Paged) -> None:
    query, keys = rand(2, 4, 16, dtype=torch.float32, seed=0), rand(2, 50, 2, 16, dtype=torch.float32, seed=1)
    expected = exact_scores(query, keys, 3, [30, 9])
    keys[:, :3], keys[0, 30:], keys[1, 9:] = torch.nan, torch.nan, torch.inf
    pool, table = in_pages(keys, 8, torch.int64)
    close(paged(query, pool, table, 3, torch.tensor([30, 9], device=DEVICE), 50), expected)


@PAGED
def test_large_logits_do_not_overflow(paged: Paged) -> None:
    query, keys = torch.full((1, 2, 16), 300.0, device=DEVICE), torch.full((1, 200, 1, 16), -300.0, device=DEVICE)
    keys[0, 150] = keys[0, 20] = 300.0
    pool, table = in_pages(keys, 16, torch.int64)
    scores = paged(query, pool, table, 0, torch.tensor([200], device=DEVICE), 200)
    expected = torch.zeros(1, 1, 200, dtype=torch.float64)
    expected[0, 0, 150] = expected[0, 0, 20] = 0.5
    close(scores, expected)


@PAGED
def test_strides_and_formats_may_differ(paged: Paged) -> None:
    query = rand(2, 40, 4, dtype=torch.float32, seed=0).mT  # [2, 4, 40]
    keys = rand(2, 60, 2, 40, dtype=torch.bfloat16, seed=1)
    stops = [60, 31]
    expected = exact_scores(query, keys, 0, stops)
    pool, table = in_pages(keys, 12, torch.int64)
    apart = pool.transpose(1, 2).contiguous().transpose(1, 2)  # [pages, 12, 2, 40], heads further apart than tokens
    backwards = table.T.contiguous().T
    close(paged(query, apart, backwards, 0, torch.tensor(stops, dtype=torch.int32, device=DEVICE), 60), expected)


@PAGED
def test_scores_of_a_key_cache_whose_pages_bound_the_span(paged: Paged) -> None:
    pages = torch.zeros(30, 8, 2, 16, device=DEVICE)
    cache = KeyCache(pages, PageAllocator(30, "keys"), seats=3, max_tokens=99)
    lengths = {0: 21, 2: 40}
    for seat, length in lengths.items():
        assert cache.grow(seat, length + 13)
        keys = rand(length, 2, 16, dtype=torch.float32, seed=seat)
        cache.append(torch.full((length,), seat, device=DEVICE), torch.arange(length, device=DEVICE), keys)
    assert len(cache.held[2]) == 7
    query, seats = rand(2, 4, 16, dtype=torch.float32, seed=7), torch.tensor([2, 0], device=DEVICE)
    stops = [36, 17]
    found = paged(query, cache.keys, cache.pages_of(seats, 56), 2, torch.tensor(stops, device=DEVICE), 56)
    keys = torch.stack([cache.keys_of(seat, 56) for seat in (2, 0)])
    close(found, exact_scores(query, keys, 2, stops))


def test_the_public_function_chooses_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys = rand(1, 2, 16, dtype=torch.float32, seed=0), rand(1, 40, 1, 16, dtype=torch.float32, seed=1)
    pool, table = in_pages(keys, 8, torch.int64)
    stops = torch.tensor([33], device=DEVICE)
    called: list[str] = []

    def note(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            called.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(kernels, "paged_retrieval_scores", note("paged", kernels.paged_retrieval_scores))
    results = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("SPECONTEXT_KERNELS", choice)
        results.append(dispatched.paged_retrieval_scores(query, pool, table, 2, stops, 40))
        assert called == ([] if choice == "torch" else ["paged"])
    close(results[1], results[0].cpu().double())
    with pytest.raises(AssertionError, match="ends before"):
        dispatched.paged_retrieval_scores(query, pool, table, 2, stops, 41)
