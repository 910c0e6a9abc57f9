"""Products with quantised matrices, in Triton and in PyTorch, against float64: kinds, tables of scales, orders of columns."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext.kernels import quantized_linear as here
from specontext.kernels.dispatch import reference_of
from specontext.kernels.quantized_linear import FP8, INT4, INT8, QuantizedMatrix, packed
from specontext.kernels.triton import quantized_linear as kernels
from specontext.quantization.linear import QuantizedLinear

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 9e-3}  # the interpreter cuts bfloat16 off
N, K = 19, 96
TABLES = [(1, 32), (8, 64), (N, K), (1, K)]


def matrix_of(
    kind: str, rows: int, columns: int, *, zeros: bool = False, order: bool = False, n: int = N, k: int = K
) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    if kind == FP8:
        codes[(codes & 127) == 127] = 1  # not a number
    table = (-(-n // rows), -(-k // columns))
    scales = torch.rand(table, generator=generator).half()
    points = torch.randint(0, 17, table, dtype=torch.uint8, generator=generator) if zeros else None
    places = torch.randperm(k, generator=generator) if order else None
    offset = {FP8: 0, INT8: 128, INT4: 8}[kind]
    matrix = QuantizedMatrix(
        kind, packed(codes & 15, columns) if kind == INT4 else codes, scales, rows, columns, points, offset, places
    )
    return matrix.to(torch.device(DEVICE))


def exact(matrix: QuantizedMatrix) -> Tensor:
    """float64 [N, K], number by number."""
    n, k = matrix.shape
    made = torch.zeros(n, k, dtype=torch.float64, device=DEVICE)
    codes, scales = here.codes_of(matrix, torch.float64), matrix.scales.double()
    for j in range(k):
        place = torch.arange(n, device=DEVICE) // matrix.rows, j // matrix.columns
        zero = matrix.offset if matrix.zeros is None else matrix.zeros[place].double()
        made[:, j if matrix.order is None else int(matrix.order[j])] = (codes[:, j] - zero) * scales[place]
    return made


def cases() -> list[Any]:
    found = []
    for number, (kind, zeros) in enumerate([(FP8, False), (INT8, False), (INT8, True), (INT4, False), (INT4, True)]):
        for place, table in enumerate(TABLES):
            found.append((kind, *table, zeros, (number + place) % 2 == 0))
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(map(str, case)))
def test_one_row_a_few_and_the_matrix_itself(case: Any) -> None:
    kind, rows, columns, zeros, order = case
    matrix = matrix_of(kind, rows, columns, zeros=zeros, order=order)
    right = exact(matrix)
    assert torch.equal(reference_of(here.dequantized)(matrix, torch.float64), right)
    assert torch.equal(kernels.dequantized(matrix, torch.float32), reference_of(here.dequantized)(matrix, torch.float32))
    bias = torch.randn(N, device=DEVICE, dtype=torch.float64)
    for m, dtype in ((1, torch.float32), (5, torch.float32), *(((1, torch.float16), (18, torch.bfloat16)) if order else ())):
        x = torch.randn(m, K, device=DEVICE).to(dtype)
        expected = x.double() @ right.T + bias.to(dtype).double()
        found = kernels.product(x, matrix, bias.to(dtype))
        assert found.dtype == dtype and found.shape == (m, N)
        assert float((found.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype], (m, dtype)


@pytest.mark.parametrize("hardware", [False, True])
def test_every_code_of_fp8(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if GPU and hardware and torch.cuda.get_device_capability() < kernels.NATIVE:
        pytest.skip("this GPU does not convert fp8")
    own = kernels.constants
    monkeypatch.setattr(kernels, "constants", lambda matrix: own(matrix) | {"HARDWARE": hardware})
    codes = torch.tensor([code for code in range(256) if code & 127 != 127] + [0, 0], dtype=torch.uint8, device=DEVICE)
    matrix = QuantizedMatrix(FP8, codes[None].contiguous(), torch.ones(1, 1, device=DEVICE), 1, 256)
    assert torch.equal(kernels.dequantized(matrix, torch.float32)[0], codes.view(torch.float8_e4m3fn).float())


def test_many_rows_and_groups_that_no_kernel_takes() -> None:
    odd = matrix_of(INT4, 1, 48)
    assert odd.group == 0
    for matrix in (odd, matrix_of(INT4, 1, 32)):
        x = torch.randn(kernels.MANY, K, device=DEVICE)
        torch.testing.assert_close(kernels.product(x, matrix, None).double(), x.double() @ exact(matrix).T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 2])
def test_tiles_of_any_size_give_the_same(rows: int) -> None:
    torch.manual_seed(rows)
    matrix, x = matrix_of(INT4, 1, 32, zeros=True, n=9, k=288), torch.randn(1, 288, device=DEVICE)
    right = x.double() @ exact(matrix).T
    for lanes in (1, 4, 64):  # they add up in other orders
        found = kernels.one_row(x, [matrix], None, kernels.Tile(rows, lanes)).double()
        assert float((found - right).norm() / right.norm()) < TOLERANCE[torch.float32], lanes


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("early", [False, pytest.param(True, marks=pytest.mark.skipif(not GPU, reason="needs a GPU"))])
def test_matrices_of_one_launch_are_those_of_their_own(rows: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when launches follow each other at once, and each reads what the one before wrote."""
    own = kernels.comes_early
    monkeypatch.setattr(kernels, "comes_early", lambda x: early and own(x))
    sizes, tile = (96, 19, 5), kernels.Tile(rows, 4)
    matrices = [matrix_of(INT4, 1, 32, zeros=True, n=n) for n in sizes]
    x = torch.randn(1, K, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    for _ in range(5 if GPU else 1):
        right = [x.double() @ exact(matrix).T for matrix in matrices]
        found = kernels.one_row(x, matrices, None, tile)
        for part, expected in zip(found.split(sizes, dim=1), right, strict=True):
            assert float((part.double() - expected).norm() / expected.norm()) < TOLERANCE[torch.float32]
        chain = [x]
        for _ in range(3):
            chain.append(kernels.one_row(chain[-1], matrices[:1], None, tile))
        for before, after in pairwise(chain):
            expected = before.double() @ exact(matrices[0]).T
            assert float((after.double() - expected).norm() / expected.norm()) < TOLERANCE[torch.float32]
        x = (found[:, :K] / found[:, :K].norm()).contiguous()


@pytest.mark.parametrize("kind", [FP8, INT4])
def test_a_compiler_takes_a_layer_whole(kind: str) -> None:
    layer = QuantizedLinear(matrix_of(kind, 1, 32), torch.randn(N, device=DEVICE))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 3, K, device=DEVICE)
    assert torch.equal(compiled(x), layer(x)) and layer(x).shape == (1, 3, N)


@pytest.mark.slow
def test_the_operation_keeps_what_it_promises() -> None:
    layer = QuantizedLinear(matrix_of(INT4, 1, 32, zeros=True, order=True), None)
    arguments = (layer.codes, layer.scales, layer.zeros, layer.order, None, INT4, 1, 32, layer.offset)
    x = torch.randn(2, K, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.specontext.quantized_linear.default, (x, *arguments))
