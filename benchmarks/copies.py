"""How fast a layer's rows are copied between a GPU and pinned host memory, by the kernels that moves and parking use.

Usage: python benchmarks/copies.py

A layer of 40,000 tokens, 8 KV heads with rows of 512 bytes: pages of 64 KB, either anywhere in a pool of 8 GiB or one after
the other; `gather_rows` with row numbers in the order of heads or of tokens, and `gather_rows_layers`, which finds rows itself
with few programs. Medians of 7, beside the copy engine.
"""

from __future__ import annotations

import statistics

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import GIB, Call, elapsed, host_memory
from torch import Tensor

from specontext.kernels.rows import gather_rows, gather_rows_layers
from specontext.kernels.tables import Copies, Pages
from specontext.kv.host_memory import CHUNK

HEADS, DIM, PAGE, TOKENS = 8, 128, 16, 40000
PAGES = TOKENS // PAGE
SIZE = TOKENS * HEADS * 2 * DIM * 2  # bytes of a layer


def timed(name: str, call: Call, size: int, device: torch.device) -> None:
    call()
    seconds = statistics.median(elapsed(call, device) for _ in range(7))
    print(f"{name:56s} {1e3 * seconds:7.2f} ms {size / seconds / 1e9:6.1f} GB/s", flush=True)


def some_pages(pool: Tensor, count: int) -> Tensor:
    """Distinct pages anywhere in a pool, int64 [count]."""
    return torch.randperm(len(pool) // (PAGE * HEADS), generator=torch.Generator().manual_seed(0))[:count]


def rows_in(pages: Tensor) -> Tensor:
    """Rows of all tokens in these pages, int64 [HEADS, TOKENS]."""
    token = torch.arange(TOKENS, device=pages.device)
    first = (pages[token // PAGE] * PAGE + token % PAGE) * HEADS
    return first + torch.arange(HEADS, device=pages.device)[:, None]


def by_row_numbers(arena: Tensor, host: Tensor, device: torch.device) -> None:
    for where, pools in (
        ("anywhere", [some_pages(pool, PAGES) for pool in (arena, host)]),
        ("in order", [torch.arange(PAGES)] * 2),
    ):
        here, there = (rows_in(pages.to(device)) for pages in pools)
        for order, (ours, theirs) in (
            ("head by head", (here, there)),
            ("token by token", (here.T.contiguous(), there.T.contiguous())),
        ):
            words = f"{order}, pages {where}"
            timed(f"to the host, {words}", lambda a=ours, b=theirs: gather_rows(arena, a, host, b), SIZE, device)
            timed(f"to the device, {words}", lambda a=ours, b=theirs: gather_rows(host, b, arena, a), SIZE, device)


def by_layers(arena: Tensor, host: Tensor, layers: int, device: torch.device) -> None:
    ours, theirs = (some_pages(pool, layers * PAGES).view(layers, 1, PAGES).to(device) for pool in (arena, host))
    index, zero = torch.arange(TOKENS, device=device)[None, None], torch.zeros(1, dtype=torch.int64, device=device)
    head_map, resident = (
        torch.zeros(size, dtype=t, device=device) for size, t in (((layers, HEADS), torch.int64), (layers, torch.bool))
    )
    every = torch.arange(layers, device=device)
    copies = Copies(zero, index, index, torch.ones_like(index, dtype=torch.bool), head_map)
    here, there = Pages(arena, ours, PAGE, HEADS), Pages(host, theirs, PAGE, HEADS)
    words = f"gather_rows_layers, {layers} layer{'s' if layers > 1 else ''}"
    timed(f"to the host, {words}", lambda: gather_rows_layers(here, there, every, resident, copies), layers * SIZE, device)
    timed(f"to the device, {words}", lambda: gather_rows_layers(there, here, every, resident, copies), layers * SIZE, device)


def main() -> None:
    device = torch.device("cuda")
    with host_memory(8 * GIB, pinned=True) as memory:
        memory.fill_(1)
        host = memory.view(torch.bfloat16).view(-1, 2, DIM)
        arena = torch.zeros((GIB // (2 * DIM * 2), 2, DIM), dtype=torch.bfloat16, device=device)
        by_row_numbers(arena, host, device)
        for layers in (1, 4):
            by_layers(arena, host, layers, device)
        block = torch.empty(CHUNK, dtype=torch.uint8, device=device)
        timed("to the host, copy engine", lambda: memory[:CHUNK].copy_(block, non_blocking=True), CHUNK, device)
        timed("to the device, copy engine", lambda: block.copy_(memory[:CHUNK], non_blocking=True), CHUNK, device)


if __name__ == "__main__":
    main()
