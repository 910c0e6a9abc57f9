"""How fast a layer's rows are copied between a GPU and pinned host memory, by the kernels that moves and parking use.

Usage: python benchmarks/copies.py

A layer of 40,000 tokens, 8 KV heads with rows of 512 bytes: pages of 64 KB on the device, and on the host alone or side by side
with three other layers, in pages of 256 KB, either anywhere in a pool of 8 GiB or one after the other. `gather_rows` moves one
layer, with row numbers in the order of heads or of tokens; `copy_pieces` moves the layers of a block. Medians of 7, beside the
copy engine.
"""

from __future__ import annotations

import statistics

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import GIB, Call, elapsed, host_memory
from torch import Tensor

from specontext.kernels.rows import copy_pieces, gather_rows
from specontext.kernels.tables import Copies, Pages
from specontext.kv.host_memory import CHUNK
from specontext.kv.layout import BlockParts, places_of
from specontext.memory.layer_blocks import LayerBlocks, one_by_one

HEADS, DIM, PAGE, TOKENS = 8, 128, 16, 40000
PAGES = TOKENS // PAGE
SIZE = TOKENS * HEADS * 2 * DIM * 2  # bytes of a layer


def timed(name: str, call: Call, size: int, device: torch.device) -> None:
    call()
    seconds = statistics.median(elapsed(call, device) for _ in range(7))
    print(f"{name:64s} {1e3 * seconds:7.2f} ms {size / seconds / 1e9:6.1f} GB/s", flush=True)


def some_pages(pool: Tensor, count: int, places: int) -> Tensor:
    """Distinct pages anywhere in a pool, int64 [count]."""
    return torch.randperm(len(pool) // (PAGE * HEADS * places), generator=torch.Generator().manual_seed(0))[:count]


def rows_in(pages: Tensor, places: int) -> Tensor:
    """Rows of all tokens of the first layer in these pages, int64 [HEADS, TOKENS]."""
    token = torch.arange(TOKENS, device=pages.device)
    first = (pages[token // PAGE] * PAGE + token % PAGE) * HEADS
    return (first + torch.arange(HEADS, device=pages.device)[:, None]) * places


def by_row_numbers(arena: Tensor, host: Tensor, places: int, device: torch.device) -> None:
    for where, pages in (
        ("anywhere", [some_pages(arena, PAGES, 1), some_pages(host, PAGES, places)]),
        ("in order", [torch.arange(PAGES)] * 2),
    ):
        here, there = rows_in(pages[0].to(device), 1), rows_in(pages[1].to(device), places)
        for order, (ours, theirs) in (
            ("head by head", (here, there)),
            ("token by token", (here.T.contiguous(), there.T.contiguous())),
        ):
            words = f"1 row in {places}, {order}, pages {where}"
            timed(f"to the host, {words}", lambda a=ours, b=theirs: gather_rows(arena, a, host, b), SIZE, device)
            timed(f"to the device, {words}", lambda a=ours, b=theirs: gather_rows(host, b, arena, a), SIZE, device)


def by_blocks(arena: Tensor, host: Tensor, layers: int, device: torch.device) -> None:
    block, alone = LayerBlocks((layers,), layers, tuple(range(layers))), one_by_one(layers)
    ours = some_pages(arena, layers * PAGES, 1).view(layers, 1, PAGES).to(device)
    theirs = some_pages(host, PAGES, layers).view(1, 1, PAGES).to(device)
    here = Pages(arena, ours, PAGE, HEADS, places_of(alone, device))
    there = Pages(host, theirs, PAGE, HEADS, places_of(block, device))
    parts = BlockParts.of_map(block, [[0] * HEADS] * layers, device).all
    index = torch.arange(TOKENS, device=device)[None, None]
    copies = Copies.of_all(torch.zeros(1, dtype=torch.int64, device=device), index, index)
    none = torch.zeros(layers, dtype=torch.bool, device=device)
    for programs in (8, 16, 32, 64):
        words, size = f"{layers} layer(s) side by side, {programs} programs", layers * SIZE
        for way, pools in (("to the host", (here, there)), ("to the device", (there, here))):
            timed(f"{way}, {words}", lambda p=pools, n=programs: copy_pieces(*p, parts, none, copies, programs=n), size, device)


def main() -> None:
    device = torch.device("cuda")
    with host_memory(8 * GIB, pinned=True) as memory:
        memory.fill_(1)
        host = memory.view(torch.bfloat16).view(-1, 2, DIM)
        arena = torch.zeros((GIB // (2 * DIM * 2), 2, DIM), dtype=torch.bfloat16, device=device)
        for places in (1, 4):
            by_row_numbers(arena, host, places, device)
        for layers in (1, 4):
            by_blocks(arena, host, layers, device)
        block = torch.empty(CHUNK, dtype=torch.uint8, device=device)
        timed("to the host, copy engine", lambda: memory[:CHUNK].copy_(block, non_blocking=True), CHUNK, device)
        timed("to the device, copy engine", lambda: block.copy_(memory[:CHUNK], non_blocking=True), CHUNK, device)


if __name__ == "__main__":
    main()
