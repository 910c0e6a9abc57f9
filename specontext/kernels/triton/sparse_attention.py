"""Split-K decode attention over KV rows that an index list, or a page table, names (flash-decoding, Dao et al. 2023).

A program takes one split of the entries of one (request, KV head) and all query heads of its group, so a row is read once
however many heads share it. A second kernel merges the splits by their log-sum-exp; nothing is added atomically, so
results are reproducible.

Rows in 8 bits have a kernel of their own, `coded_attention.py`, and latents `latent_attention.py`; all share the merge.

Bytes: 2 * D * itemsize a row; the index (8 or 4, once a row; a page table is read once a page), and for
every split 4 * (D + 1) written and read again for each query head.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.spans import vectors_in
from specontext.kernels.tables import is_quantised
from specontext.kernels.triton import coded_attention, latent_attention
from specontext.kernels.triton.coded_attention import Tile
from specontext.kernels.triton.online_softmax import LN2, capped

PROCESSORS = 132  # of an H100 or H200; stands in for devices that are none
LEAST_ROWS = 32  # entries of the smallest split
LARGEST_BLOCK = 64  # entries of which a program has two under way and computes a third
# How long programs take, in rows of 512 bytes that a processor reads while all of them read, 34 GB/s. Fitted to an H200 with 1 to
# 54 requests, 2,048 to 65,536 entries and 1 to 48 splits (benchmarks/results/h200/kernels-splits-*.txt and kernels-paged-*.txt).
HELD = 3  # programs that a processor holds at once
PACE = (1.2, 0.82, 0.88)  # times as long as one of 1, 2 or 3 programs of a processor takes while others are idle, each
CROWD = 5  # a wave behind another finds a processor in so many taken, though others are free
BEGINS = 81  # rows that could be read while another wave of programs begins
MERGE, MERGES = 206, 4.4  # and while splits are merged, and for each of them
NEARLY = 1.005


@triton.jit(do_not_specialize=["width", "splits"])
def _attend(
    query_ptr,  # [R, Hq, D]
    arena_ptr,  # [N, 2, D]
    index_ptr,  # rows [R, Hkv, B], or pages [R, P]
    lengths_ptr,  # [R], pages only
    output_ptr,  # [R, Hq, splits, D]
    lse_ptr,  # [R, Hq, splits], in base 2 unless FINAL
    scale_log2,
    cap_log2,  # a soft cap on logits in base 2, where CAPPED
    width,
    splits,
    kv_heads,
    query_r,
    query_h,
    index_r,
    index_h,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0 for rows
    FORMAT: tl.constexpr,  # of the factors of the products; sums are float32
    DOT: tl.constexpr,
    FINAL: tl.constexpr,  # one split: the result itself
    CAPPED: tl.constexpr,
):
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, DIM_PAD)
    in_group, in_dim = member < GROUP, dim < DIM
    query_head = head * GROUP + member
    query = tl.load(
        query_ptr + request * query_r + query_head[:, None] * query_h + dim[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    ).to(FORMAT)
    length = width
    if PAGE_SIZE:
        length = tl.load(lengths_ptr + request).to(tl.int32)
    index_ptr += request * index_r + head.to(tl.int64) * index_h
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)

    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        present = entry < end
        if PAGE_SIZE:
            page = tl.load(index_ptr + entry // PAGE_SIZE, mask=present, other=0).to(tl.int64)
            row = (page * PAGE_SIZE + entry % PAGE_SIZE) * kv_heads + head
        else:
            row = tl.load(index_ptr + entry, mask=present, other=-1).to(tl.int64)
            present = row >= 0
        read = present[:, None] & in_dim[None, :]
        place = arena_ptr + (row * (2 * DIM))[:, None] + dim[None, :]
        key = tl.load(place, mask=read, other=0.0).to(FORMAT)  # [BLOCK, DIM_PAD]
        value = tl.load(place + DIM, mask=read, other=0.0).to(FORMAT)
        if DOT:
            logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2  # [GROUP_PAD, BLOCK]
        else:
            logits = tl.sum(query[:, None, :].to(tl.float32) * key[None, :, :].to(tl.float32), 2) * scale_log2
        if CAPPED:
            logits = capped(logits, cap_log2)
        logits = tl.where(present[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing was present yet: no -inf - -inf
        weights = tl.exp2(logits - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weights, 1)
        if DOT:
            acc = acc * keep[:, None] + tl.dot(weights.to(FORMAT), value, input_precision="ieee")
        else:
            acc = acc * keep[:, None] + tl.sum(weights[:, :, None] * value[None, :, :].to(tl.float32), 1)
        top = new_top

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top + tl.log2(total))
    if FINAL:
        lse *= LN2
    place = (request * kv_heads * GROUP + query_head) * splits + split
    tl.store(lse_ptr + place, lse, mask=in_group)
    result = (acc / total[:, None]).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + place[:, None] * DIM + dim[None, :], result, mask=in_group[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=["splits"])
def _merge(
    partial_ptr,  # [R * Hq, splits, D]
    partial_lse_ptr,  # [R * Hq, splits], base 2
    output_ptr,  # [R * Hq, D]
    lse_ptr,  # [R * Hq]
    splits,
    SPLITS_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM_PAD)
    every = tl.arange(0, SPLITS_PAD)
    lses = tl.load(partial_lse_ptr + head * splits + every, mask=every < splits, other=float("-inf"))
    top = tl.max(lses, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lses - base), 0)
    acc = tl.zeros([DIM_PAD], tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        inside = split < splits
        weight = tl.exp2(tl.load(partial_lse_ptr + head * splits + split, mask=inside, other=float("-inf")) - base)
        place = partial_ptr + (head * splits + split)[:, None] * DIM + dim[None, :]
        part = tl.load(place, mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(lse_ptr + head, tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2))
    tl.store(output_ptr + head * DIM + dim, (acc / total).to(output_ptr.dtype.element_ty), mask=dim < DIM)


def sparse_attention(
    query: Tensor,
    arena: Tensor,
    rows: Tensor,
    scale: float,
    cap: float | None = None,
    *,
    splits: int | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.sparse_attention`.

    Args:
        splits: programs that share the entries of a (request, KV head); chosen by `choose_splits` when None.
        tile: of a program for rows in 8 bits; see `coded_attention.attend`.
    """
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    strides = (rows.stride(0), rows.stride(1))
    return launch(query, arena, rows, strides, None, rows.shape[2], rows.shape[1], scale, 0, splits, cap, tile)


def launch(
    query: Tensor,
    arena: Tensor,
    index: Tensor,
    index_strides: tuple[int, int],
    lengths: Tensor | None,
    width: int,
    kv_heads: int,
    scale: float,
    page_size: int,
    splits: int | None,
    cap: float | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Run both kernels over at most `width` entries of every (request, KV head).

    Args:
        index: rows [R, Hkv, width], or pages [R, P] when `page_size` is not 0.
        index_strides: steps of `index` from request to request and from KV head to KV head.
        lengths: [R], with pages.
    """
    requests, query_heads, head_dim = query.shape
    assert arena.is_contiguous(), "rows must lie one after another"
    query = query if query.stride(-1) == 1 else query.contiguous()
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty((requests, query_heads), dtype=torch.float32, device=query.device)
    latents, group = vectors_in(arena, head_dim) == 1, query_heads // kv_heads
    if splits is None:
        pairs = requests * (latent_attention.tiles(query) if latents else kv_heads)
        splits = choose_splits(pairs, width, query.device)
    partial, partial_lse = output, lse
    if splits > 1:
        count = requests * query_heads * splits
        scratch = torch.empty(count * (head_dim + 1), dtype=torch.float32, device=query.device)
        partial, partial_lse = scratch[: count * head_dim], scratch[count * head_dim :]
    if latents:
        assert kv_heads == 1, "latents are rows of one KV head"
        latent_attention.attend(
            *(query, arena, index, index_strides[0], lengths, partial, partial_lse, width, scale, cap),
            page_size=page_size,
            splits=splits,
        )
    elif is_quantised(arena):
        coded_attention.attend(
            *(query, arena, index, index_strides, lengths, partial, partial_lse, width, kv_heads, scale, cap),
            page_size=page_size,
            splits=splits,
            tile=tile,
        )
    else:
        shape = tile_shape(query, arena, group)
        if width <= splits * LEAST_ROWS:
            shape["BLOCK"] = min(shape["BLOCK"], LEAST_ROWS)
        _attend[(kv_heads, splits, requests)](
            query,
            arena,
            index,
            index if lengths is None else lengths,
            partial,
            partial_lse,
            scale / LN2.value,
            0.0 if cap is None else cap / LN2.value,
            width,
            splits,
            kv_heads,
            query.stride(0),
            query.stride(1),
            *index_strides,
            PAGE_SIZE=page_size,
            FINAL=splits == 1,
            CAPPED=cap is not None,
            num_warps=4,
            num_stages=5,  # so that the index and two blocks of rows are under way while a third is computed
            **shape,
        )
    if splits > 1:
        _merge[(requests * query_heads,)](
            partial,
            partial_lse,
            output,
            lse,
            splits,
            SPLITS_PAD=triton.next_power_of_2(splits),
            DIM=head_dim,
            DIM_PAD=max(16, triton.next_power_of_2(head_dim)),
            BLOCK=min(4 if latents else 16, triton.next_power_of_2(splits)),  # wide rows fill as many registers
            num_warps=4,
        )
    return output, lse


def tile_shape(query: Tensor, arena: Tensor, group: int) -> dict[str, Any]:
    """Compile-time sizes that fit a model, the same for all its calls.

    Tensor cores want 16 queries: a group is padded to that, which costs nothing where reading is what takes time. Float32 has
    no tensor cores of full precision, and a few queries in it multiply and add element by element.
    """
    head_dim = query.shape[2]
    scaled = is_quantised(arena)
    exact = (query.dtype != arena.dtype and not scaled) or query.dtype == torch.float32
    dim_pad, group_pad = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(group)
    dot = group > 4 or not exact
    if dot:
        block = max(16, min(LARGEST_BLOCK, (2048 if exact else 8192) // dim_pad))
    else:
        block = max(8, min(LARGEST_BLOCK, 4096 // (dim_pad * group_pad)))
    kind = tl.float32 if exact else tl.float16 if scaled or query.dtype == torch.float16 else tl.bfloat16
    if kind == tl.bfloat16 and not query.is_cuda:  # the interpreter multiplies bfloat16 as if it were integers
        kind = tl.float32
    return {
        "GROUP": group,
        "GROUP_PAD": max(16, group_pad) if dot else group_pad,
        "DIM": head_dim,
        "DIM_PAD": dim_pad,
        "BLOCK": block,
        "FORMAT": kind,
        "DOT": dot,
    }


def choose_splits(pairs: int, width: int, device: torch.device) -> int:
    """Splits for `pairs` (request, KV head) pairs of at most `width` entries, none with fewer than LEAST_ROWS: the fewest with
    which programs fill the processors, and the last wave of them, about as well as with any number."""
    return _choose_splits(pairs, width, processors(device))


@lru_cache(4096)
def _choose_splits(pairs: int, width: int, count: int) -> int:
    most = max(1, min(-(-width // LEAST_ROWS), 4 * -(-HELD * count // pairs)))
    expected = [expected_rows(pairs, width, splits, count) for splits in range(1, most + 1)]
    return next(splits for splits, rows in enumerate(expected, 1) if rows <= NEARLY * min(expected))


def expected_rows(pairs: int, width: int, splits: int, count: int) -> float:
    """What each of `count` processors could read until `splits` of `width` entries are read and merged."""
    block = LEAST_ROWS if width <= splits * LEAST_ROWS else LARGEST_BLOCK
    share = -(-width // (splits * block)) * block
    full, rest = divmod(pairs * -(-width // share), HELD * count)
    most = min(HELD, -(-(rest + (count // CROWD if full else 0)) // count))  # of the last wave, on a processor
    last = max(rest / count, most * PACE[most - 1]) if rest else 0.0
    waves = full + (rest > 0)
    return (HELD * full + last) * share + (waves - 1) * BEGINS + (MERGE + MERGES * splits if splits > 1 else 0.0)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return _processors(device.index) if device.type == "cuda" else PROCESSORS


@cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
