"""Attention operations: over the rows of a budget, over a whole context in pages, of a chunk of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_case import PAGE_SIZE, Case
from kernel_checks import ROUNDED, Operation, calls_of, exact_attention, numbers_at, relative_error, require, row_numbers
from torch import Tensor

from specontext.kernels.dense_attention import chunk_attention
from specontext.kernels.paged_attention import paged_attention, tile_buffer, tokens_of_pages
from specontext.kernels.rows import gather_tokens
from specontext.kernels.sparse_attention import sparse_attention
from specontext.kernels.tables import Pages
from specontext.kv.layout import places_of
from specontext.memory.layer_blocks import one_by_one
from specontext.memory.tiles import prompt_tile

SPLITS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 32, 48)
TILES = ((32, 4, 5), (64, 4, 4), (64, 4, 5), (64, 8, 5), (128, 4, 4), (128, 4, 5), (128, 8, 5))  # rows, warps, stages


def sparse(case: Case) -> list[Operation]:
    """One call a layer, as in a decode step: every layer has rows of its own."""
    return _sparse(case, {"sparse_attention": sparse_attention})


def sparse_tiles(case: Case) -> list[Operation]:
    """The same by programs made in other ways."""
    if case.device.type != "cuda":
        return []
    from specontext.kernels.triton.sparse_attention import sparse_attention as on_gpu

    return _sparse(case, {f"sparse_{name}": partial(on_gpu, **made) for name, made in _programs(case).items()})


def _sparse(case: Case, ways: dict[str, Callable[..., tuple[Tensor, Tensor]]]) -> list[Operation]:
    shape, width = case.shape, case.budget.total
    count = min(shape.layers, 32)
    queries, rows = case.queries(count), []
    for layer in range(count):
        order = [torch.randperm(case.slots, generator=case.order)[:width] for _ in range(case.requests * shape.kv_heads)]
        entries = torch.stack(order).view(case.requests, shape.kv_heads, width).to(case.device)
        rows.append(row_numbers(case.arena_pages[layer], entries, shape.kv_heads))
    right = torch.stack(
        [exact_attention(queries[1, r], numbers_at(case.arena, rows[1][r]), case.scale) for r in range(case.requests)]
    )
    words = f"{case.requests} x {shape.query_heads} / {shape.kv_heads} heads, {width} rows of {shape.row_bytes} B"
    moved = case.requests * shape.kv_heads * width * (shape.row_bytes + rows[0].itemsize)

    def operation(name: str, attend: Callable[..., tuple[Tensor, Tensor]]) -> Operation:
        def call(i: int) -> tuple[Tensor, Tensor]:
            return attend(queries[i], case.arena, rows[i], case.scale)

        error = require(name.replace("_", " "), relative_error(call(1)[0], right), ROUNDED[shape.dtype])
        return Operation(name, words, calls_of(call, count), error, moved)

    return [operation(name, attend) for name, attend in ways.items()]


def paged(case: Case) -> list[Operation]:
    by_page = _pages(case).by_page(0)

    def attend(query: Tensor, pages: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return paged_attention(query, by_page, pages, lengths, case.scale)

    return _paged(case, {"paged_attention": attend})


def paged_tiles(case: Case) -> list[Operation]:
    """The same by programs made in other ways."""
    if case.device.type != "cuda":
        return []
    from specontext.kernels.triton.paged_attention import paged_attention as on_gpu

    def by(made: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        sizes = {"page_size": PAGE_SIZE, "kv_heads": case.shape.kv_heads}
        return lambda query, pages, lengths: on_gpu(query, case.context_rows, pages, lengths, case.scale, **sizes, **made)

    return _paged(case, {f"paged_{name}": by(made) for name, made in _programs(case).items()})


def _paged(case: Case, ways: dict[str, Callable[..., tuple[Tensor, Tensor]]]) -> list[Operation]:
    shape, count = case.shape, len(case.context_pages)
    queries, lengths = case.queries(count), torch.full((case.requests,), case.context, device=case.device)
    right = torch.stack([exact_attention(queries[1, r], _context(case, 1, r), case.scale) for r in range(case.requests)])
    words = f"{case.requests} x {shape.query_heads} / {shape.kv_heads} heads, {case.context} tokens"
    moved = case.requests * case.context * shape.kv_heads * shape.row_bytes

    def operation(name: str, attend: Callable[..., tuple[Tensor, Tensor]]) -> Operation:
        def call(i: int) -> tuple[Tensor, Tensor]:
            return attend(queries[i], case.context_pages[i], lengths)

        error = require(name.replace("_", " "), relative_error(call(1)[0], right), ROUNDED[shape.dtype])
        return Operation(name, words, calls_of(call, count), error, moved)

    return [operation(name, attend) for name, attend in ways.items()]


def _programs(case: Case) -> dict[str, dict[str, Any]]:
    """Numbers of splits, and of rows in 8 bits tiles, by names."""
    if case.shape.kv_dtype is None:
        return {f"{splits}_splits": {"splits": splits} for splits in SPLITS}
    from specontext.kernels.triton.coded_attention import Tile

    return {
        f"{rows}_rows_{warps}_warps_{stages}_stages_{splits}_splits": {"splits": splits, "tile": Tile(rows, warps, stages)}
        for rows, warps, stages in TILES
        for splits in SPLITS
    }


def _pages(case: Case) -> Pages:
    """The sets of contexts as layers."""
    layers = places_of(one_by_one(len(case.context_pages)), case.device)
    return Pages(case.context_rows, case.context_pages, PAGE_SIZE, case.shape.kv_heads, layers)


def _context(case: Case, i: int, r: int) -> Tensor:
    """K and V [Hkv, S, 2 or 1, D] of a request's context, copied."""
    tokens = torch.arange(case.context, device=case.device)[None, None]
    return numbers_at(case.context_rows, _pages(case).rows_of(i, case.seats[r : r + 1], tokens)[0])


def prefill(case: Case) -> list[Operation]:
    """A chunk of request 0 whose earlier tokens are read from pages of the device, tile by tile, as the engine does.

    To latents it attends in latent space, as short chunks do.
    """
    shape, chunk, count = case.shape, case.chunk, len(case.context_pages)
    gpu = case.device.type == "cuda"
    past, tile = case.context - chunk, prompt_tile(shape.kv_heads * shape.row_bytes) if gpu else 1024
    query = case.random(count, chunk, shape.query_heads, shape.head_dim)
    new = case.random(case.row[0], count, chunk, shape.kv_heads, shape.head_dim)
    pages = _pages(case)
    by_page = pages.by_page(0)
    buffer = tile_buffer(by_page, min(tile, past))

    def call(i: int) -> Tensor:
        attention = chunk_attention(query[i], new[0, i], new[-1, i], case.scale)
        for start in range(0, past, tile):
            end = min(start + tile, past)
            if gpu:
                part = buffer.flatten(0, 1)[: end - start]
                gather_tokens(pages, i, 0, start, part)
            else:
                part = tokens_of_pages(by_page, case.context_pages[i, 0], start, end, buffer=buffer)
            attention.add(part)
        return attention.result()

    found = call(1)
    stored, own = _context(case, 1, 0)[:, :past], new[:, 1].permute(2, 1, 0, 3)  # [Hkv, T, *row]
    some = sorted({0, chunk // 2, chunk - 1})
    right = [exact_attention(query[1, n], torch.cat((stored, own[:, : n + 1]), 1), case.scale) for n in some]
    error = require("prefill attention", relative_error(found[some], torch.stack(right)), ROUNDED[shape.dtype])
    flops = 4 * shape.query_heads * shape.head_dim * (chunk * past + chunk * (chunk + 1) // 2)
    words = f"{chunk} tokens after {past}, {shape.query_heads} / {shape.kv_heads} heads"
    return [Operation("prefill_attention", words, calls_of(call, count), error, flops=flops, over="arithmetic")]
