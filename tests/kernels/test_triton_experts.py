"""Products of rows with the experts that they chose, in Triton and in PyTorch, against float64; the host never waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specontext.kernels import quantized_experts as here
from specontext.kernels.dispatch import reference_of
from specontext.kernels.quantized_linear import FP8, INT4, INT8, QuantizedMatrix
from specontext.kernels.triton import quantized_experts as kernels
from tests.kernels.test_triton_quantized import DEVICE, GPU, TOLERANCE, exact, matrix_of

EXPERTS, N, K = 5, 24, 96
CASES = [(FP8, 8, 32, False), (FP8, N, K, False), (INT8, 1, K, True), (INT4, 1, 32, False), (INT4, 1, 32, True)]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::unique", "aten::masked_select")


def experts_of(kind: str, rows: int, columns: int, zeros: bool) -> QuantizedMatrix:
    return matrix_of(kind, rows, columns, zeros=zeros, n=EXPERTS * N, k=K)


def choices(rows: int, each: int, *, unlike: bool = False) -> Tensor:
    """Experts [rows, each], another one in each place of a row; of unlike ones none chooses expert 2, and most choose 4."""
    generator = torch.Generator().manual_seed(rows)
    places = torch.stack([torch.randperm(EXPERTS, generator=generator)[:each] for _ in range(rows)])
    if unlike:
        places[: rows // 2, 0] = 4
        places[places == 2] = 3
    return places.to(DEVICE)


def right(x: Tensor, chosen: Tensor, matrix: QuantizedMatrix) -> Tensor:
    weights = exact(matrix).view(EXPERTS, N, K)
    return torch.einsum("mk,mcnk->mcn", x.double(), weights[chosen])


@EACH
@pytest.mark.parametrize(("rows", "each"), [(1, 2), (3, 1), (40, 2), (150, 1)], ids=str)
def test_products_of_chosen_experts(case: Any, rows: int, each: int) -> None:
    matrix, chosen = experts_of(*case), choices(rows, each, unlike=rows > 9)
    for dtype in (torch.float32, torch.float16) if rows == 40 else (torch.float32,):
        x = torch.randn(rows, K, device=DEVICE).to(dtype)
        expected = right(x, chosen, matrix)
        for product in (kernels.chosen_products, reference_of(here.chosen_products)):
            found = product(x, chosen, matrix, EXPERTS)
            assert found.dtype == dtype and found.shape == (rows, each, N)
            assert float((found.double() - expected).norm() / expected.norm()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(("run", "numbers"), [(kernels.pairs, (1, 5)), (kernels.tiles, (1, 33, 90))])
def test_both_kernels_take_any_number_of_rows(run: Callable[..., None], numbers: tuple[int, ...]) -> None:
    matrix = experts_of(INT4, 1, 32, True)
    for rows in numbers:
        x, chosen = torch.randn(rows, K, device=DEVICE), choices(rows, 3)
        out = torch.full((rows, 3, N), torch.nan, device=DEVICE)
        run(x, chosen, matrix, EXPERTS, out)
        torch.testing.assert_close(out.double(), right(x, chosen, matrix), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tall", [16, 64])
@pytest.mark.parametrize("alike", [False, True])
def test_tiles_hold_every_pair_once(tall: int, alike: bool) -> None:
    chosen = choices(70, 2) if not alike else torch.full((70, 2), EXPERTS - 1, device=DEVICE)
    order, ends, expert_of_tile, first = kernels.tiles_of(chosen, EXPERTS, tall)
    seen = []
    for expert, start in zip(expert_of_tile.tolist(), first.tolist(), strict=True):
        if expert < EXPERTS:
            own = order[start : min(start + tall, int(ends[expert]))].tolist()
            assert own and all(int(chosen.flatten()[pair]) == expert for pair in own)
            seen += own
    assert sorted(seen) == list(range(140))


class Operations(TorchDispatchMode):
    """Names of the operations that were run, and shapes of what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append((func.name().split(".")[0], getattr(result, "shape", None)))
        return result


def operations(call: Callable[[], Any]) -> list[Any]:
    with Operations() as mode:
        call()
    return mode.seen


@pytest.mark.parametrize("rows", [3, 100])
def test_what_is_launched_follows_from_shapes_alone(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a captured step may choose other experts: the same operations, grids and shapes, and nothing that the host reads."""
    matrix, x, launched = experts_of(INT4, 1, 32, True), torch.randn(rows, K, device=DEVICE), []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *tensors, **sizes: launched.append((grid, [getattr(one, "shape", one) for one in tensors], sizes))

    for name in ("_pairs", "_tiles"):
        monkeypatch.setattr(kernels, name, Kernel())
    alike, found = torch.zeros(rows, 2, dtype=torch.int64, device=DEVICE), []
    for chosen in (choices(rows, 2), alike, choices(rows, 2, unlike=True)):
        found.append(operations(lambda chosen=chosen: kernels.chosen_products(x, chosen, matrix, EXPERTS)))
    assert found[0] == found[1] == found[2] and launched[0] == launched[1] == launched[2]
    assert not any(name in WAITS for name, _ in found[0])
    waiting = operations(lambda: reference_of(here.chosen_products)(x, alike, matrix, EXPERTS))
    assert any(name in WAITS for name, _ in waiting)  # so that one that waits is seen


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("rows", [3, 100])
def test_a_captured_product_takes_other_choices(rows: int) -> None:
    matrix, x, chosen = experts_of(FP8, 8, 32, False), torch.randn(rows, K, device=DEVICE), choices(rows, 2)
    kernels.chosen_products(x, chosen, matrix, EXPERTS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.chosen_products(x, chosen, matrix, EXPERTS)
    chosen.copy_(choices(rows, 2, unlike=True))
    graph.replay()
    torch.testing.assert_close(out.double(), right(x, chosen, matrix), rtol=1e-4, atol=1e-3)


def arguments(matrix: QuantizedMatrix, x: Tensor, chosen: Tensor) -> tuple[Any, ...]:
    settings = matrix.kind, matrix.rows, matrix.columns, matrix.offset, EXPERTS
    return (x, chosen, matrix.codes, matrix.scales, matrix.zeros, *settings)


def test_gradients_pass_to_x() -> None:
    matrix, chosen = experts_of(INT4, 1, 32, True), choices(6, 2)
    x = torch.randn(6, K, device=DEVICE, requires_grad=True)
    found = here.quantized_experts(*arguments(matrix, x, chosen))
    upstream = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, x, upstream)
    expected = torch.einsum("mcn,mcnk->mk", upstream.double(), exact(matrix).view(EXPERTS, N, K)[chosen])
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_the_operation_keeps_what_it_promises() -> None:
    x = torch.randn(6, K, device=DEVICE, requires_grad=True)
    given = arguments(experts_of(INT4, 1, 32, True), x, choices(6, 2))
    torch.library.opcheck(torch.ops.specontext.quantized_experts.default, given)


# Compiled for a GPU, where kernels are not interpreted: bytes of shared memory that a program takes.
COMPILED = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specontext.kernels.triton import quantized_experts as kernels
from specontext.kernels.triton.quantized_linear import few_tile

POINTERS = {"x": "*bf16", "out": "*bf16", "codes": "*u8", "scales": "*fp16", "zeros": "*u8"}
POINTERS |= dict.fromkeys(("chosen", "order", "expert_of_tile", "first_of_tile", "ends"), "*i64")

def shared(kernel, capability, stages, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": 4, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared

found = {}
for capability in (80, 90):
    for kind, rows, columns, zeros in ((0, 128, 128, False), (1, 1, 2048, True), (2, 1, 128, True)):
        form = {"SCALE_ROWS": rows, "SCALE_COLUMNS": columns, "KIND": kind, "HARDWARE": capability == 90, "HAS_ZEROS": zeros}
        pairs = shared(kernels._pairs, capability, 3, each=8, BLOCK_N=4, LANES=128, GROUP=128, **form)
        tall = []
        for m in (16, 32, 64):
            tile = few_tile(8192, m, 2)
            form |= {"FORMAT": triton.language.bfloat16, "BLOCK_M": m, "BLOCK_N": tile.rows, "GROUPS": tile.groups, "GROUP": 128}
            tall.append(shared(kernels._tiles, capability, tile.stages, **form))
        found[f"{capability} {kind}"] = [pairs, *tall]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_they_compile_and_fit_into_the_memory_of_a_processor() -> None:
    """An A100 has 163 KiB for each program, an H100 227."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 6 and all(size < 100 << 10 for sizes in found.values() for size in sizes)
