"""Triton kernels for rows that are key and value at once, in the interpreter against float64 and the references."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from specontext.kernels import rows as rows_of_kv
from specontext.kernels.attention_logits import attention_logits_reference
from specontext.kernels.dispatch import reference_of
from specontext.kernels.paged_attention import paged_attention_reference
from specontext.kernels.sparse_attention import sparse_attention
from specontext.kernels.tables import NewTokens, Pages, Places

pytest.importorskip("triton")
from specontext.kernels.triton import rows as triton_rows
from specontext.kernels.triton import sparse_attention as split_k
from specontext.kernels.triton.attention_logits import attention_logits
from specontext.kernels.triton.paged_attention import paged_attention
from tests.kernels.test_triton_attention import DEVICE, FORMATS, TOLERANCE, rand, rows_with_gaps

# R, Hq, entries, D
SHAPES = [(1, 1, 1, 12), (2, 5, 33, 40), (2, 40, 70, 64), (1, 16, 100, 576), (3, 17, 20, 320)]


def right(query: Tensor, arena: Tensor, rows: Tensor, scale: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """Output and logits in float64."""
    read = arena[rows[:, 0].clamp(min=0), 0].double()  # [R, B, D]
    logits = query.double() @ read.mT * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(rows < 0, -math.inf)
    return torch.softmax(logits, -1).nan_to_num(0.0) @ read, logits


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("splits", "cap"), [(None, 2.0), *(pytest.param(n, None, marks=pytest.mark.slow) for n in (1, 3))])
@pytest.mark.parametrize(("requests", "heads", "width", "dim"), SHAPES)
def test_sparse_attention(
    requests: int, heads: int, width: int, dim: int, splits: int | None, cap: float | None, dtype: torch.dtype
) -> None:
    query, arena = rand(requests, heads, dim, dtype=dtype, seed=0), rand(width * 3 + 2, 1, dim, dtype=dtype, seed=1)
    rows, scale = rows_with_gaps(requests, 1, width, len(arena)), 0.7 * dim**-0.5
    output, lse = split_k.sparse_attention(query, arena, rows, scale, cap, splits=splits)
    expected, logits = right(query, arena, rows, scale, cap)
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-4)
    reference = reference_of(sparse_attention)(query, arena, rows, scale, cap)
    torch.testing.assert_close(output.float(), reference[0].float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, reference[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("splits", "page_size"), [(3, 7), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((None, 16), (1, 1)))]
)
@pytest.mark.parametrize(("requests", "heads", "width", "dim"), SHAPES[:3])
def test_paged_attention(
    requests: int, heads: int, width: int, dim: int, splits: int | None, page_size: int, dtype: torch.dtype
) -> None:
    count = -(-width // page_size)
    pages = torch.randperm(requests * count + 1, generator=torch.Generator().manual_seed(3))[: requests * count]
    pages = pages.view(requests, count).to(DEVICE)
    arena = rand((requests * count + 1) * page_size, 1, dim, dtype=dtype, seed=1)
    query, lengths = rand(requests, heads, dim, dtype=dtype, seed=0), torch.tensor([width, width // 3][:requests], device=DEVICE)
    token = torch.arange(width, device=DEVICE)
    rows = torch.where(token < lengths[:, None], pages[:, token // page_size] * page_size + token % page_size, -1)[:, None]
    output, lse = paged_attention(query, arena, pages.int(), lengths, 0.2, page_size=page_size, kv_heads=1, splits=splits)
    expected, logits = right(query, arena, rows, 0.2)
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-4)
    reference = paged_attention_reference(query, arena.view(-1, page_size, 1, 1, dim), pages, lengths, 0.2, tile=16)
    torch.testing.assert_close(output.float(), reference[0].float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("requests", "heads", "width", "dim"), SHAPES)
def test_attention_logits(requests: int, heads: int, width: int, dim: int, dtype: torch.dtype) -> None:
    query, arena = rand(requests, heads, dim, dtype=dtype, seed=0), rand(width * 3 + 2, 1, dim, dtype=dtype, seed=1)
    rows = rows_with_gaps(requests, 1, width, len(arena))
    logits = attention_logits(query, arena, rows, 0.3)
    torch.testing.assert_close(logits.double(), right(query, arena, rows, 0.3)[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits, attention_logits_reference(query, arena, rows, 0.3), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("dim", "page_size"), [(12, 3), (40, 16), (576, 4)])
def test_rows_are_appended_once_and_gathered(dim: int, page_size: int, dtype: torch.dtype) -> None:
    tokens = 9
    table = 1 + torch.randperm(20, generator=torch.Generator().manual_seed(5)).view(1, 2, 10).to(DEVICE)
    pools = [rand(21 * page_size, 1, dim, dtype=dtype, seed=4) for _ in range(2)]
    row = rand(tokens, 1, dim, dtype=dtype, seed=6)
    positions = torch.tensor([0, 1, 2, -1, 5, 6, 7, 11, 12], device=DEVICE)
    new = NewTokens(torch.ones_like(positions), positions, positions, row, row)
    alone = Places(((0, 0),), *(torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2)), 1)
    pages = [Pages(pool, table, page_size, 1, alone) for pool in pools]
    triton_rows.append_tokens(pages[0], 0, new)
    reference_of(rows_of_kv.append_tokens)(pages[1], 0, new)
    assert torch.equal(pools[0], pools[1])
    read = row.new_empty((4, 1, 1, dim))
    triton_rows.gather_tokens(pages[0], 0, 1, 5, read[:3])
    assert torch.equal(read[:3, :, 0], row[4:7])


# Compiled for Hopper, where kernels are not interpreted: bytes of shared memory that a program takes.
COMPILED = """
import json
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specontext.kernels.triton import latent_attention

KINDS = {"index_ptr": "*i64", "lengths_ptr": "*i64", "rows_ptr": "*i64", "output_ptr": "*fp32", "lse_ptr": "*fp32"}
KINDS |= {"logits_ptr": "*fp32", "scale_log2": "fp32", "cap_log2": "fp32", "scale": "fp32"}

NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8"}
NAMES |= {torch.float8_e4m3fn: "*fp8e4nv"}

def shared(kernel, dtype, codes=None, **constants):
    numbers = torch.empty(1, 128, 576, dtype=dtype)
    arena = numbers if codes is None else torch.empty(1, 16, 580, dtype=codes)
    sizes, warps = latent_attention.tile_sizes(numbers, arena, on_gpu=True)
    names = kernel.arg_names
    kinds = KINDS | {"query_ptr": NAMES[dtype], "arena_ptr": NAMES[arena.dtype]}
    kinds["words_ptr"] = kinds["arena_ptr"] if codes is None else "*i32"
    constants |= sizes
    signature = {one: "constexpr" if one in constants else kinds.get(one, "i32") for one in names}
    aligned = [i for i, one in enumerate(names) if signature[one].startswith("*") or one in ("query_r", "query_h")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(one),): value for one, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared

found = []
for dtype in (torch.bfloat16, torch.float32):
    for page in (0, 16):
        found.append(shared(latent_attention._attend, dtype, PAGE_SIZE=page, FINAL=False, CAPPED=page == 0))
    found.append(shared(latent_attention._logits, dtype))
for codes in (torch.float8_e4m3fn, torch.int8):
    for page in (0, 16):
        found.append(shared(latent_attention._attend, torch.bfloat16, codes, PAGE_SIZE=page, FINAL=False, CAPPED=False))
    found.append(shared(latent_attention._logits, torch.bfloat16, codes))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_they_compile_and_fit_into_the_memory_of_a_processor() -> None:
    """With DeepSeek-V3's 128 heads and rows of 576 numbers; an H100 has 227 KiB for each program."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert all(0 < size < 227 << 10 for size in json.loads(ran.stdout.splitlines()[-1]))
