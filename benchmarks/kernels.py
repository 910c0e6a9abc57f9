"""Time of every operation of the decode step and of prefill, in the shapes of public models, against what memory allows.

Usage: python benchmarks/kernels.py [--device cuda] [--model llama-3.1-8b] [--context 131072] [--budget 2048] [--json]
       python benchmarks/kernels.py --only top_k,gather --quick

Operations (names for --only):
  scores     paged retrieval scores of all keys of the head, with the maximum of each group
  top_k      top-k of these scores; top_k_64k: of 4 rows x 64K with k = 2048; each with torch.topk beside it
  slot_plan  set difference and slot choice, in the steady state of a sequence of selections with the stated overlap
  gather     the missing rows of all layers, from the host pool into slots; on CUDA the pool is pinned and as large as stated
  rows       numbers of the arena rows that a selection stands for, all layers at once
  append     new rows of one layer: of a resident one, and of an offloaded one to both tiers
  sparse     decode attention over the budget's rows, one call a layer
  paged      decode attention over the whole context in pages
  prefill    causal attention of a chunk at the end of the context
  head       forward pass of the retrieval head for one token of each request

Every operation is checked against float64 or the PyTorch reference before it is timed; a wrong result ends the run. All data is
random. Calls rotate among inputs that together exceed the caches, except where the engine finds them there as well: scores just
written, slot tables. On CUDA calls are captured into graphs, on a CPU they are timed one by one; samples of all operations are
interleaved, and medians reported.

The floor is the bytes that an operation must move over a bandwidth that this run measured: reading device memory, or the copy
engine's for rows that cross the bus; for prefill it is the operations over the rate of a large matrix product. Prints a table,
then with --json one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait

import torch
from measure import (
    GIB,
    Call,
    Timer,
    copy_bandwidth,
    copy_engine_bandwidth,
    fill,
    host_memory,
    interleaved,
    machine,
    multiply_rate,
    read_bandwidth,
    versions,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specontext.core import ModelShape
from specontext.kernels import rows as moves
from specontext.kernels.dense_attention import chunk_attention
from specontext.kernels.dispatch import use_triton
from specontext.kernels.paged_attention import paged_attention, tile_buffer, tokens_of_pages
from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.kernels.slot_plan import plan_slots, plan_slots_reference
from specontext.kernels.sparse_attention import sparse_attention
from specontext.kernels.top_k import top_k_positions
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig
from specontext.retrieval.selector import Budget

# transformers looks for Hugging Face's package of this file's name. What it finds must not import transformers in turn, hence
# the imports inside functions, and must be too old for it.
__version__ = "0"

PAGE_SIZE = 16
SINK, RECENT = 4, 16
FEATURE_LAYERS = 3
LONG_ROWS = (4, 65536, 2048)  # rows, scores and k of the case that has a target
LONG_ROWS_TARGET = 25e-6
GATHER_TARGET = 0.7  # of the copy engine's bandwidth
ROUNDED = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-4}  # tolerated relative error of attention


class WrongResult(Exception):
    """An operation does not compute what its reference does."""


@dataclass
class Operation:
    """Something that is timed.

    Attributes:
        calls: take turns; each works on inputs of its own.
        bytes: that one call must move: over the bus for rows from or to pinned memory, else in the device's memory.
        flops: floating-point operations of one call, where they and not bytes are the limit.
        error: relative error against the reference.
        over: "memory", "bus" or "arithmetic": what the floor is made of.
    """

    name: str
    shape: str
    calls: Sequence[Call]
    error: float
    bytes: int | None = None
    flops: int | None = None
    over: str = "memory"
    note: str = ""


@dataclass
class Case:
    """Sizes of one run and the data that operations share, made when first used.

    Attributes:
        shape: of the model; its dtype is that of KV and head keys.
        slots: device slots of each KV head.
        chunk: tokens of a prefill chunk.
        long_rows: rows, scores and k of the second top-k.
        pool_bytes: size of the host pool; on a CPU None makes it as large as the context needs.
        rotated_bytes: inputs of one operation together are at least that large.
    """

    shape: ModelShape
    context: int
    budget: Budget
    slots: int
    requests: int
    overlap: float
    chunk: int
    device: torch.device
    pool_bytes: int | None = None
    long_rows: tuple[int, int, int] = LONG_ROWS
    rotated_bytes: int = 256 << 20
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.order = torch.Generator().manual_seed(1)

    @property
    def groups(self) -> int:
        """Retrieval groups: the head has as many as the model has KV heads."""
        return self.shape.kv_heads

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    def random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return fill(torch.empty(size, dtype=dtype or self.shape.dtype, device=self.device), self.generator)

    def queries(self, count: int) -> Tensor:
        """Queries [count, R, Hq, D]; their logits over random keys have a standard deviation of 1."""
        return self.random(count, self.requests, self.shape.query_heads, self.shape.head_dim)

    def permutation(self, count: int, least: int = 0) -> Tensor:
        return (torch.randperm(count, generator=self.order) + least).to(self.device)

    def sets(self, set_bytes: int, most: int = 16) -> int:
        """How many sets of inputs of this size an operation rotates among."""
        return min(most, max(2, -(-self.rotated_bytes // set_bytes)))

    @cached_property
    def token_pages(self) -> int:
        """Pages of one request's context in one layer."""
        return -(-self.context // PAGE_SIZE)

    @cached_property
    def seats(self) -> Tensor:
        return torch.arange(self.requests, device=self.device)

    @cached_property
    def arena(self) -> Tensor:
        """Slots of all layers and requests: [N, 2, D]."""
        return self.random((self.arena_pages.numel() + 1) * PAGE_SIZE * self.shape.kv_heads, 2, self.shape.head_dim)

    @cached_property
    def arena_pages(self) -> Tensor:
        """int64 [L, R, P], distinct."""
        pages = -(-self.slots // PAGE_SIZE)
        return self.permutation(self.shape.layers * self.requests * pages, 1).view(self.shape.layers, self.requests, pages)

    @cached_property
    def host(self) -> Tensor:
        """The host pool [N, 2, D], on CUDA pinned."""
        page_bytes = PAGE_SIZE * self.shape.kv_heads * self.shape.row_bytes
        needed = self.shape.layers * self.requests * self.token_pages + 1
        pages = needed if self.pool_bytes is None else self.pool_bytes // page_bytes
        if pages <= self.requests * self.token_pages:
            raise ValueError(f"the host pool holds fewer than {self.requests} x {self.context} tokens of one layer: enlarge it")
        memory = self.stack.enter_context(host_memory(pages * page_bytes, pinned=self.device.type == "cuda"))
        # The CPU writes it: a copy engine refuses a range that was pinned in several parts.
        return fill(memory.view(self.shape.dtype), self.order).view(-1, 2, self.shape.head_dim)

    @cached_property
    def host_pages(self) -> Tensor:
        """int64 [L, R, P], distinct, as prompts of `chunk` tokens a step leave them: runs of a layer's pages, layer after layer.

        Where the pool has too little room, layers share pages.
        """
        layers, run = self.shape.layers, max(1, self.chunk // PAGE_SIZE)
        token = torch.arange(self.token_pages)
        layer = torch.arange(layers)[:, None, None]
        request = torch.arange(self.requests)[:, None] * (-(-self.token_pages // run) * run * layers)
        pages = request + token // run * (run * layers) + layer * run + token % run
        pool = self.host.numel() * self.host.itemsize // (PAGE_SIZE * self.shape.kv_heads * self.shape.row_bytes) - 1
        return (1 + pages % pool).to(self.device)

    @cached_property
    def scattered_pages(self) -> Tensor:
        """int64 [L, R, P], anywhere in the pool; distinct in a layer."""
        pool = self.host.numel() * self.host.itemsize // (PAGE_SIZE * self.shape.kv_heads * self.shape.row_bytes) - 1
        most = self.requests * self.token_pages
        rows = [self.permutation(pool, 1)[:most].view(self.requests, -1) for _ in range(self.shape.layers)]
        return torch.stack(rows)

    @cached_property
    def context_pages(self) -> Tensor:
        """Page tables int64 [sets, R, P] of whole contexts of a layer on the device."""
        count = self.sets(self.requests * self.token_pages * PAGE_SIZE * self.shape.kv_heads * self.shape.row_bytes)
        pages = self.permutation(count * self.requests * self.token_pages, 1)
        return pages.view(count, self.requests, self.token_pages)

    @cached_property
    def context_rows(self) -> Tensor:
        """Rows [N, 2, D] of these pages."""
        return self.random((self.context_pages.numel() + 1) * PAGE_SIZE * self.shape.kv_heads, 2, self.shape.head_dim)

    @cached_property
    def selections(self) -> list[Tensor]:
        """Scored tokens int64 [R, G, K] of a sequence that ends where it begins; steps share `overlap` of their tokens.

        Tokens come back after so many steps that their slots have been taken, so that every step misses what is new in it.
        """
        low, high, width = SINK, self.context - RECENT, self.budget.scored
        new = width - round(width * self.overlap)
        hot = self.slots - SINK - RECENT
        count = 4 if new == 0 else max(4, -(-hot // new) + 2)
        cycle = max(width, count * new)
        if cycle > high - low:
            raise ValueError(f"{self.context} tokens are too few for selections of {width} with overlap {self.overlap}")
        pairs = range(self.requests * self.groups)
        orders = torch.stack([torch.randperm(high - low, generator=self.order)[:cycle] + low for _ in pairs])
        found = []
        for step in range(count):
            window = (step * new + torch.arange(width)) % cycle
            found.append(orders[:, window].sort(-1).values.view(self.requests, self.groups, width))
        return found

    def empty_tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """slot_of_token, token_of_slot and last_used of empty slots."""
        pairs, hot = (self.requests, self.groups), self.slots - SINK - RECENT
        slot_of_token = torch.full((*pairs, self.context), -1, dtype=torch.int32, device=device)
        token_of_slot = torch.full((*pairs, hot), -1, dtype=torch.int32, device=device)
        return slot_of_token, token_of_slot, torch.zeros((*pairs, hot), dtype=torch.int32, device=device)

    @cached_property
    def plans(self) -> list[tuple[Tensor, Tensor]]:
        """Slots and misses of two rounds through the selections by the reference, on the CPU; the second is the steady state."""
        tables = self.empty_tables(torch.device("cpu"))
        seats = torch.arange(self.requests)
        return [plan_slots_reference(tokens, seats, *tables, step + 1) for step, tokens in enumerate(self.selections * 2)]


# Checks ---------------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, right: Tensor) -> float:
    """Root mean square of the difference over that of the right numbers, in float64."""
    found, right = found.double(), right.double()
    return float((found - right).norm() / right.norm().clamp(min=1e-300))


def require(name: str, error: float, most: float) -> float:
    if not error <= most:
        raise WrongResult(f"{name}: relative error {error:.3g} against the reference, at most {most:.3g} is right")
    return error


def require_equal(name: str, found: Tensor, right: Tensor) -> float:
    if found.shape != right.shape or not torch.equal(found.to(right), right):
        raise WrongResult(f"{name}: differs from the reference")
    return 0.0


def exact_attention(query: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Attention in float64: query [Hq, D] over rows [Hkv, T, 2, D] gives [Hq, D]."""
    keys, values = rows.double().unbind(2)
    grouped = query.double().view(len(rows), -1, query.shape[-1])
    return (torch.softmax(grouped @ keys.mT * scale, -1) @ values).view(query.shape)


def row_numbers(pages: Tensor, entries: Tensor, kv_heads: int) -> Tensor:
    """Rows [R, Hkv, B] of entries [R, Hkv, B] in the pages [R, P]."""
    page = pages.gather(1, (entries // PAGE_SIZE).flatten(1)).view_as(entries)
    return (page * PAGE_SIZE + entries % PAGE_SIZE) * kv_heads + torch.arange(kv_heads, device=entries.device)[:, None]


# Operations -----------------------------------------------------------------------------------------------------------


def scores(case: Case) -> list[Operation]:
    shape, groups = case.shape, case.groups
    set_bytes = case.requests * case.context * groups * shape.head_dim * shape.dtype.itemsize
    count = case.sets(set_bytes)
    pages = case.permutation(count * case.requests * case.token_pages, 1).view(count, case.requests, case.token_pages)
    keys = case.random(pages.numel() + 1, PAGE_SIZE, groups, shape.head_dim)
    queries, stops = case.queries(count), torch.full((case.requests,), case.context - RECENT, device=case.device)

    def call(i: int) -> Tensor:
        return paged_retrieval_scores(queries[i], keys, pages[i], SINK, stops, case.context)

    found = call(1)
    error = 0.0
    for r in range(case.requests):
        seen = keys[pages[1, r]].flatten(0, 1)[SINK : case.context - RECENT].double()  # [S, G, D]
        grouped = queries[1, r].double().view(groups, -1, shape.head_dim)
        right = torch.softmax(grouped @ seen.permute(1, 2, 0) * case.scale, -1).amax(1)
        error = max(error, relative_error(found[r, :, SINK : case.context - RECENT], right))
        if (found[r, :, :SINK] != -1).any() or (found[r, :, case.context - RECENT :] != -1).any():
            raise WrongResult("retrieval scores: entries that do not compete have scores")
    require("retrieval scores", error, 1e-3)
    words = f"{case.requests} x {case.context} keys, {groups} x {shape.query_heads // groups} queries, D {shape.head_dim}"
    moved = set_bytes + case.requests * groups * case.context * 4
    return [Operation("retrieval_scores", words, _calls(call, count), error, moved)]


def _calls(call: Callable[[int], Any], count: int) -> list[Call]:
    return [lambda i=i: call(i) for i in range(count)]  # type: ignore[misc]


def top_k(case: Case) -> list[Operation]:
    return _top_k(case, "top_k", case.requests * case.groups, case.context, case.budget.scored)


def top_k_64k(case: Case) -> list[Operation]:
    found = _top_k(case, "top_k_64k", *case.long_rows)
    if case.long_rows == LONG_ROWS and case.device.type == "cuda":
        found[0].note = f"target {1e6 * LONG_ROWS_TARGET:.0f} us"
    return found


def _top_k(case: Case, name: str, rows: int, span: int, k: int) -> list[Operation]:
    count = 4  # few and small: the scores kernel leaves them in the cache
    values = torch.softmax(case.random(count, rows, span, dtype=torch.float32) * 2, -1)

    def call(i: int) -> Tensor:
        return top_k_positions(values[i], k)

    for i in range(count):
        chosen = call(i)
        if (chosen[:, 1:] <= chosen[:, :-1]).any() or (chosen < 0).any():
            raise WrongResult(f"{name}: positions do not ascend")
        best = values[i].topk(k, dim=-1).values
        require_equal(name, values[i].gather(-1, chosen).sort(-1, descending=True).values, best)
    words, moved = f"{rows} x {span}, k {k}", rows * (span * 4 + k * 8)
    return [
        Operation(name, words, _calls(call, count), 0.0, moved),
        Operation(f"{name}_torch", words, _calls(lambda i: values[i].topk(k, dim=-1), count), 0.0, moved, note="torch.topk"),
    ]


def slot_plan(case: Case) -> list[Operation]:
    selections, plans = case.selections, case.plans
    moved = [tokens.to(case.device) for tokens in selections]
    tables, count = case.empty_tables(case.device), len(moved)
    # The device counts the steps, so that a graph can be replayed: the first call of each round moves all numbers on.
    steps = torch.arange(1 - count, 1, dtype=torch.int32, device=case.device)

    def call(i: int) -> tuple[Tensor, Tensor]:
        if i == 0:
            steps.add_(count)
        return plan_slots(moved[i], case.seats, *tables, steps[i])

    for n, (slots, missing) in enumerate(plans):
        found = call(n % count)
        require_equal("slot plan", found[0].cpu(), slots)
        require_equal("slot plan", found[1].cpu(), missing)
    misses = _misses(case)
    entries, hot = moved[0].numel(), tables[1].numel()
    words = f"{case.requests} x {case.groups} pairs, {case.budget.scored} of {case.slots - SINK - RECENT} slots, {misses} misses"
    least = entries * (8 + 4 + 8 + 1 + 4) + hot * 4 + misses * 5 * 4
    return [Operation("slot_plan", words, _calls(call, count), 0.0, least)]


def _misses(case: Case) -> int:
    """Misses of a step in the steady state, all pairs together (mean)."""
    steady = case.plans[len(case.selections) :]
    return round(sum(int(missing.sum()) for _, missing in steady) / len(steady))


def gather(case: Case) -> list[Operation]:
    """Pages as the engine lays them out and, beside it, anywhere in the pool: what a lack of order costs."""
    return [_gather(case, "gather", case.host_pages), _gather(case, "gather_scattered", case.scattered_pages)]


def _gather(case: Case, name: str, pages: Tensor) -> Operation:
    shape, device = case.shape, case.device
    steady = case.plans[len(case.selections) :]
    tokens = [t.to(device) for t in case.selections]
    slots = [torch.where(s >= 0, s + SINK + RECENT, s).to(device) for s, _ in steady]
    missing = [m.to(device) for _, m in steady]
    if device.type == "cuda" and not use_triton(tokens[0]):
        raise WrongResult("gather: the kernel would not run here; is Triton installed?")
    fixed = {
        "source": case.host,
        "source_pages": pages,
        "target_pages": case.arena_pages,
        "layers": torch.arange(shape.layers, device=device),
        "seats": case.seats,
        "head_map": torch.arange(shape.kv_heads, device=device).expand(shape.layers, -1).contiguous(),
        "resident": torch.zeros(shape.layers, dtype=torch.bool, device=device),
        "page_size": PAGE_SIZE,
    }

    def plan(i: int) -> dict[str, Tensor]:
        return {"tokens": tokens[i], "slots": slots[i], "missing": missing[i]}

    def call(i: int) -> None:
        moves.gather_rows_layers(target=case.arena, **fixed, **plan(i))

    right = case.arena.clone()
    moves.gather_rows_layers_reference(target=right, **fixed, **plan(1))
    call(1)
    error = require_equal("gather", case.arena, right)
    del right
    rows = _misses(case) * shape.layers * shape.kv_heads // case.groups
    pool = case.host.numel() * case.host.itemsize / GIB
    words = f"{rows} rows of {shape.row_bytes} B, {shape.layers} layers, pool {pool:.1f} GiB"
    crossed = rows * shape.row_bytes
    operation = Operation(name, words, _calls(call, len(tokens)), error, crossed if device.type == "cuda" else 2 * crossed)
    if device.type == "cuda":
        operation.over, operation.note = "bus", f"target {GATHER_TARGET:.0%} of the copy engine"
    return operation


def rows(case: Case) -> list[Operation]:
    """Rows of a selection for all layers; every second layer is resident, with the arena's pages as pages of its tokens."""
    from specontext.kernels import row_index

    shape, width, device = case.shape, case.budget.total, case.device
    count, most = 4, case.arena_pages.shape[2] * PAGE_SIZE
    entries = torch.randint(most, (2, count, case.requests, case.groups, width), generator=case.order).to(device)
    entries[..., -1] = -1
    fixed = {
        "token_pages": case.arena_pages,
        "slot_pages": case.arena_pages.flip(2).contiguous(),
        "resident": torch.arange(shape.layers, device=device) % 2 == 0,
        "seats": case.seats,
        "head_map": torch.arange(shape.kv_heads, device=device).expand(shape.layers, -1).contiguous(),
        "page_size": PAGE_SIZE,
    }

    def call(i: int) -> Tensor:
        return row_index.selected_rows(entries[0, i], entries[1, i], **fixed)

    right = row_index.selected_rows_reference(entries[0, 1], entries[1, 1], **fixed)
    error, size = require_equal("row index", call(1), right), call(1).itemsize
    pairs = case.requests * width
    words = f"{case.requests} x {shape.layers} layers x {shape.kv_heads} heads x {width}"
    moved = pairs * (2 * case.groups * 8 + shape.layers * shape.kv_heads * size)
    return [Operation("row_index", words, _calls(call, count), error, moved)]


def append(case: Case) -> list[Operation]:
    shape, count = case.shape, 8
    new = case.random(2, count, case.requests, shape.kv_heads, shape.head_dim)
    lengths = torch.full((case.requests,), case.context, device=case.device)
    host_pages, slot_pages, context_pages = case.host_pages[0], case.arena_pages[0], case.context_pages[0]
    positions = [lengths - 1 - i for i in range(count)]
    tiers = {
        "host": case.host,
        "arena": case.arena,
        "host_pages": host_pages,
        "token_pages": slot_pages,  # of a resident layer; not read here
        "slot_pages": slot_pages,
        "resident": torch.zeros(1, dtype=torch.bool, device=case.device),
        "page_size": PAGE_SIZE,
        "sink": SINK,
        "recent": RECENT,
    }

    def tokens(i: int) -> dict[str, Tensor]:
        return {"seats": case.seats, "positions": positions[i], "key": new[0, i], "value": new[1, i]}

    def offloaded(i: int) -> None:
        moves.append_layer(**tiers, **tokens(i), lengths=lengths)

    def resident(i: int) -> None:
        moves.append_tokens(case.context_rows, context_pages, **tokens(i), page_size=PAGE_SIZE)

    for i in range(count):
        offloaded(i)
        resident(i)
    _synchronize(case.device)
    for i in range(count):
        right = torch.stack((new[0, i], new[1, i]), 2)  # [R, Hkv, 2, D]
        ring = SINK + positions[i] % RECENT
        for pool, pages, entry in (
            (case.host, host_pages, positions[i]),
            (case.arena, slot_pages, ring),
            (case.context_rows, context_pages, positions[i]),
        ):
            rows = row_numbers(pages, entry[:, None, None].expand(-1, shape.kv_heads, 1), shape.kv_heads)[..., 0]
            require_equal("append", pool[rows.to(pool.device)], right.to(pool.device))
    size = case.requests * shape.kv_heads * shape.row_bytes
    words = f"{case.requests} tokens x {shape.kv_heads} heads, one layer"
    both = Operation("append_tiers", words, _calls(offloaded, count), 0.0, 3 * size)
    if case.device.type == "cuda":
        both.bytes, both.over = size, "bus"
    return [both, Operation("append_tokens", words, _calls(resident, count), 0.0, 2 * size)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sparse(case: Case) -> list[Operation]:
    """One call a layer, as in a decode step: every layer has rows of its own."""
    shape, width = case.shape, case.budget.total
    count = min(shape.layers, 32)
    queries, rows = case.queries(count), []
    for layer in range(count):
        order = [torch.randperm(case.slots, generator=case.order)[:width] for _ in range(case.requests * shape.kv_heads)]
        entries = torch.stack(order).view(case.requests, shape.kv_heads, width).to(case.device)
        rows.append(row_numbers(case.arena_pages[layer], entries, shape.kv_heads))

    def call(i: int) -> tuple[Tensor, Tensor]:
        return sparse_attention(queries[i], case.arena, rows[i], case.scale)

    found = call(1)[0]
    right = torch.stack([exact_attention(queries[1, r], case.arena[rows[1][r]], case.scale) for r in range(case.requests)])
    error = require("sparse attention", relative_error(found, right), ROUNDED[shape.dtype])
    words = f"{case.requests} x {shape.query_heads} / {shape.kv_heads} heads, {width} rows of {shape.row_bytes} B"
    moved = case.requests * shape.kv_heads * width * (shape.row_bytes + rows[0].itemsize)
    return [Operation("sparse_attention", words, _calls(call, count), error, moved)]


def paged(case: Case) -> list[Operation]:
    shape, count = case.shape, len(case.context_pages)
    queries, lengths = case.queries(count), torch.full((case.requests,), case.context, device=case.device)
    sizes = {"page_size": PAGE_SIZE, "kv_heads": shape.kv_heads}

    def call(i: int) -> tuple[Tensor, Tensor]:
        return paged_attention(queries[i], case.context_rows, case.context_pages[i], lengths, case.scale, **sizes)

    found, right = call(1)[0], []
    for r in range(case.requests):
        right.append(exact_attention(queries[1, r], _context(case, 1, r), case.scale))
    error = require("paged attention", relative_error(found, torch.stack(right)), ROUNDED[shape.dtype])
    words = f"{case.requests} x {shape.query_heads} / {shape.kv_heads} heads, {case.context} tokens"
    moved = case.requests * case.context * shape.kv_heads * shape.row_bytes
    return [Operation("paged_attention", words, _calls(call, count), error, moved)]


def _context(case: Case, i: int, r: int) -> Tensor:
    """Rows [Hkv, S, 2, D] of a request's context, copied."""
    paged_rows = case.context_rows.view(-1, PAGE_SIZE, case.shape.kv_heads, 2, case.shape.head_dim)
    return paged_rows[case.context_pages[i, r]].flatten(0, 1)[: case.context].transpose(0, 1)


def prefill(case: Case) -> list[Operation]:
    """A chunk of request 0 whose earlier tokens are read from pages of the device, tile by tile, as the engine does."""
    shape, chunk, count = case.shape, case.chunk, len(case.context_pages)
    past, tile = case.context - chunk, 16384 if case.device.type == "cuda" else 1024
    query = case.random(count, chunk, shape.query_heads, shape.head_dim)
    new = case.random(2, count, chunk, shape.kv_heads, shape.head_dim)
    sizes = {"page_size": PAGE_SIZE, "kv_heads": shape.kv_heads}
    buffer = tile_buffer(case.context_rows, tile, **sizes)

    def tiles(i: int) -> Iterator[Tensor]:
        for start in range(0, past, tile):
            end = min(start + tile, past)
            yield tokens_of_pages(case.context_rows, case.context_pages[i, 0], start, end, **sizes, buffer=buffer)

    def call(i: int) -> Tensor:
        return chunk_attention(query[i], new[0, i], new[1, i], case.scale, tiles(i))

    found = call(1)
    stored, own = _context(case, 1, 0)[:, :past], torch.stack((new[0, 1], new[1, 1]), 2).transpose(0, 1)  # [Hkv, T, 2, D]
    some = sorted({0, chunk // 2, chunk - 1})
    right = [exact_attention(query[1, n], torch.cat((stored, own[:, : n + 1]), 1), case.scale) for n in some]
    error = require("prefill attention", relative_error(found[some], torch.stack(right)), ROUNDED[shape.dtype])
    flops = 4 * shape.query_heads * shape.head_dim * (chunk * past + chunk * (chunk + 1) // 2)
    words = f"{chunk} tokens after {past}, {shape.query_heads} / {shape.kv_heads} heads"
    return [Operation("prefill_attention", words, _calls(call, count), error, flops=flops, over="arithmetic")]


def head(case: Case) -> list[Operation]:
    """Rotates among copies of the head: between two steps the model's weights drive it out of the caches."""
    shape = case.shape
    config = HeadConfig(
        variant="features",
        hidden_size=shape.hidden_size,
        target_hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        heads=shape.query_heads,
        kv_heads=case.groups,
        head_dim=shape.head_dim,
        feature_layers=tuple(range(FEATURE_LAYERS)),
    )
    first = RetrievalHead(config).to(device=case.device, dtype=shape.dtype).requires_grad_(False)
    size = sum(p.numel() * p.element_size() for p in first.parameters())
    heads = [first, *(copy.deepcopy(first) for _ in range(case.sets(size) - 1))]
    embeddings = case.random(len(heads), case.requests, shape.hidden_size)
    features = case.random(len(heads), case.requests, shape.hidden_size * FEATURE_LAYERS)
    positions = torch.full((case.requests,), case.context - 1, device=case.device)

    def call(i: int) -> tuple[Tensor, Tensor]:
        return heads[i](embeddings[i], features[i], positions)

    exact = copy.deepcopy(first).double()(embeddings[1].double(), features[1].double(), positions)
    error = max(relative_error(found, right) for found, right in zip(call(1), exact, strict=True))
    require("head", error, 3 * ROUNDED[shape.dtype])
    words = f"{case.requests} tokens, {size / 1e6:.0f} MB of weights, {config.heads} / {config.kv_heads} heads"
    return [Operation("head_forward", words, _calls(call, len(heads)), error, size)]


OPERATIONS: dict[str, Callable[[Case], list[Operation]]] = {
    "scores": scores,
    "top_k": top_k,
    "top_k_64k": top_k_64k,
    "slot_plan": slot_plan,
    "gather": gather,
    "rows": rows,
    "append": append,
    "sparse": sparse,
    "paged": paged,
    "prefill": prefill,
    "head": head,
}


# The run --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(case: Case, names: Sequence[str], rounds: int, *, keep_going: bool = False) -> dict[str, Any]:
    """Check and time operations.

    Args:
        keep_going: an operation that fails is left out and listed, and the others are timed all the same.

    Returns:
        What the report says of speeds: bandwidths, the rate of a matrix product, `operations`, and errors of those that `failed`.
    """
    failed: dict[str, str] = {}
    with case.stack:  # until here the host pool stays pinned
        operations = []
        for name in names:
            try:
                operations += OPERATIONS[name](case)
            except Exception as error:
                if not keep_going:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
        rates = {
            "memory": read_bandwidth(case.device),
            "copy": copy_bandwidth(case.device),
            "arithmetic": multiply_rate(case.shape.dtype, case.device),
        }
        if any(operation.over == "bus" for operation in operations):
            rates["bus"] = copy_engine_bandwidth(case.host, case.device)
        timers = [Timer(operation.calls, case.device) for operation in operations]
        seconds = interleaved(timers, rounds)
    measured = zip(operations, timers, seconds, strict=True)
    return {
        "bandwidth_gb_s": rates["memory"] / 1e9,
        "copy_gb_s": rates["copy"] / 1e9,
        "h2d_gb_s": rates["bus"] / 1e9 if "bus" in rates else None,
        "matmul_tflop_s": rates["arithmetic"] / 1e12,
        "operations": [describe(operation, timer, s, rates[operation.over]) for operation, timer, s in measured],
        "failed": failed,
    }


def describe(operation: Operation, timer: Timer, seconds: float, rate: float) -> dict[str, Any]:
    """An operation's line of the report; `rate` is that of what its floor is made of, a second."""
    amount = max(1, operation.bytes or operation.flops or 0)
    note = operation.note if timer.why is None else f"{operation.note} not captured: {timer.why}".strip()
    return {
        "name": operation.name,
        "shape": operation.shape,
        "us": 1e6 * seconds,
        "bytes": operation.bytes,
        "gb_s": None if operation.bytes is None else operation.bytes / seconds / 1e9,
        "tflop_s": None if operation.flops is None else operation.flops / seconds / 1e12,
        "floor_us": 1e6 * amount / rate,
        "floor_ratio": seconds * rate / amount,
        "share_of_floor": amount / rate / seconds,
        "floor_of": operation.over,
        "error": operation.error,
        "timed": timer.how,
        "note": note,
    }


def show(report: dict[str, Any]) -> None:
    title = f"{report['model']} on {report['machine']}: {report['context']:,} tokens, budget {report['budget']:,}"
    table = Table(title=f"{title}, {report['requests']} request(s), {report['dtype']}")
    for column, justify in (("operation", "left"), ("shape", "left"), ("us", "right"), ("MB", "right"), ("GB/s", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("floor us", "x floor", "error"):
        table.add_column(column, justify="right")
    table.add_column("timed")
    for line in report["operations"]:
        arithmetic = line["bytes"] is None
        table.add_row(
            line["name"],
            "\n".join(part for part in (line["shape"], line["note"]) if part),
            f"{line['us']:,.1f}",
            "" if arithmetic else f"{line['bytes'] / 1e6:,.2f}",
            f"{line['tflop_s']:,.2f} TFLOP/s" if arithmetic else f"{line['gb_s']:,.1f}",
            f"{line['floor_us']:,.1f}",
            f"{line['floor_ratio']:,.2f}",
            f"{line['error']:.1g}",
            line["timed"],
        )
    console = Console()
    console.print(table)
    bus = "" if report["h2d_gb_s"] is None else f", host to device {report['h2d_gb_s']:,.1f} (copy engine)"
    console.print(
        f"GB/s here: reading {report['bandwidth_gb_s']:,.1f}, copying {report['copy_gb_s']:,.1f} (read and written){bus}; "
        f"matrix product {report['matmul_tflop_s']:,.2f} TFLOP/s"
    )
    for line in report["operations"]:
        if line["floor_of"] == "bus" and line["name"] == "gather":
            console.print(f"gather reaches {line['share_of_floor']:.0%} of the copy engine's bandwidth")


def parse(values: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="llama-3.1-8b (default on CUDA), qwen3-0.6b (default on a CPU) or llama-3.2-1b")
    parser.add_argument("--dtype", choices=sorted(str(dtype).removeprefix("torch.") for dtype in ROUNDED), default="bfloat16")
    parser.add_argument("--context", type=int, help="default: 131072 on CUDA, 32768 on a CPU")
    parser.add_argument("--budget", type=int, help="default: 2048 on CUDA, 1024 on a CPU")
    parser.add_argument("--slots", type=int, help="device slots of a KV head; default: the budget and a quarter")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--overlap", type=float, default=0.85)
    parser.add_argument("--chunk", type=int, help="tokens of a prefill chunk; default: 1024 on CUDA, 256 on a CPU")
    parser.add_argument("--pool-gib", type=float, help="host pool; default: 16 on CUDA, what the context needs on a CPU")
    parser.add_argument("--rounds", type=int, help="samples of each operation; default: 25 on CUDA, 7 on a CPU")
    parser.add_argument("--only", help=f"comma-separated: {', '.join(OPERATIONS)}")
    parser.add_argument("--keep-going", action="store_true", help="time the others when an operation fails")
    parser.add_argument("--quick", action="store_true", help="defaults of 4,096 tokens, budget 512 and a pool of 1 GiB")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(values)
    _set_defaults(arguments)
    _check(parser, arguments)
    return arguments


def _set_defaults(arguments: argparse.Namespace) -> None:
    cuda, quick = arguments.device.startswith("cuda"), arguments.quick
    defaults: dict[str, Any] = {
        "model": "llama-3.1-8b" if cuda else "qwen3-0.6b",
        "context": 4096 if quick else 131072 if cuda else 32768,
        "budget": 512 if quick else 2048 if cuda else 1024,
        "chunk": 1024 if cuda else 256,
        "pool_gib": (1 if quick else 16) if cuda else None,
        "rounds": 25 if cuda else 5 if quick else 7,
        "only": ",".join(OPERATIONS),
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.slots is None:
        arguments.slots = arguments.budget + arguments.budget // 4


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    least = 20 if arguments.device.startswith("cuda") else 5
    unknown = set(arguments.only.split(",")) - set(OPERATIONS)
    if unknown:
        parser.error(f"--only: no operation {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}")
    if arguments.rounds < least:
        parser.error(f"--rounds must be at least {least}: medians of fewer say little")
    if arguments.budget <= SINK + RECENT or arguments.slots < arguments.budget or arguments.context < arguments.budget:
        parser.error(f"--budget must exceed {SINK + RECENT}, and neither slots nor context may be fewer than the budget")
    if not 0 < arguments.chunk < arguments.context:
        parser.error("--chunk must be shorter than the context")
    if not 0 <= arguments.overlap <= 1:
        parser.error("--overlap is a share, from 0 to 1")


def case_of(arguments: argparse.Namespace, device: torch.device) -> Case:
    from shapes import config_of

    return Case(
        shape=ModelShape.from_config(config_of(arguments.model), getattr(torch, arguments.dtype)),
        context=arguments.context,
        budget=Budget(arguments.budget, SINK, RECENT),
        slots=arguments.slots,
        requests=arguments.requests,
        overlap=arguments.overlap,
        chunk=arguments.chunk,
        device=device,
        pool_bytes=None if arguments.pool_gib is None else round(arguments.pool_gib * GIB),
    )


def make_report(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    settings = ("model", "dtype", "device", "context", "budget", "slots", "requests", "overlap", "chunk", "pool_gib", "rounds")
    return {
        "benchmark": "kernels",
        "date": date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        **{name: getattr(arguments, name) for name in settings},
        **measure(case_of(arguments, device), arguments.only.split(","), arguments.rounds, keep_going=arguments.keep_going),
    }


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    try:
        report = make_report(arguments, device)
    except (WrongResult, MemoryError, ValueError) as error:
        sys.exit(f"stopped: {error}")
    show(report)
    if arguments.json:
        print(json.dumps(report))
    if report["failed"]:
        sys.exit("\n".join(f"failed: {name}: {why}" for name, why in report["failed"].items()))


if __name__ == "__main__":
    main()
