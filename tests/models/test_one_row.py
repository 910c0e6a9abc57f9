"""What the compiler makes of products with one row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from specontext.models.loading import load_model
from specontext.models.one_row import compile_one_row, sums

PRODUCTS = ("aten.mm.default", "aten.bmm.default", "aten.addmm.default")
Compute = Callable[..., Tensor]
CASES: dict[str, tuple[Compute, tuple[tuple[int, ...], ...]]] = {
    "mm": (lambda row, matrix: row @ matrix, ((1, 300), (300, 70))),
    "linear": (lambda row, weight: torch.nn.functional.linear(row, weight), ((1, 300), (70, 300))),
    "bias": (lambda row, weight, bias: torch.nn.functional.linear(row, weight, bias), ((1, 300), (70, 300), (70,))),
    "addmm": (lambda bias, row, matrix: torch.addmm(bias, row, matrix, beta=0.5, alpha=3), ((1, 70), (1, 300), (300, 70))),
    "bmm": (lambda rows, matrices: rows @ matrices, ((5, 1, 300), (5, 300, 70))),
}


def traced(compute: Compute, shapes: tuple[tuple[int, ...], ...], device: str) -> tuple[torch.fx.GraphModule, list[str]]:
    """The graph of a function, and the products in it."""
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    graph = make_fx(compute, decomposition_table=sums({}))(*inputs)
    return graph, [str(node.target) for node in graph.graph.nodes if str(node.target) in PRODUCTS]


@pytest.mark.parametrize("case", CASES)
def test_products_with_one_row_are_sums_in_float32(case: str) -> None:
    compute, shapes = CASES[case]
    graph, products = traced(compute, shapes, "meta")
    assert not products
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    exact = compute(*(one.double() for one in inputs))
    found = graph(*inputs)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-4), "rounded once"


@pytest.mark.parametrize(
    ("case", "shapes", "device"),
    [
        ("mm", ((2, 300), (300, 70)), "meta"),
        ("bias", ((3, 300), (70, 300), (70,)), "meta"),
        ("bmm", ((5, 2, 300), (5, 300, 70)), "meta"),
        ("mm", ((1, 300), (300, 70)), "cpu"),
        ("bmm", ((5, 1, 300), (5, 300, 70)), "cpu"),
    ],
)
def test_other_products_stay(case: str, shapes: tuple[tuple[int, ...], ...], device: str) -> None:
    _, products = traced(CASES[case][0], shapes, device)
    assert len(products) == 1


def test_what_others_make_of_products_is_kept() -> None:
    others = {torch.ops.aten.mm.default: lambda rows, matrix: rows.new_zeros((len(rows), matrix.shape[1]))}
    decomposed = sums(others)[torch.ops.aten.mm.default]
    assert not decomposed(torch.ones(2, 3), torch.ones(3, 4)).any()
    assert sums({})[torch.ops.aten.mm.default](torch.ones(2, 3), torch.ones(3, 4)) is NotImplemented


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_compiled_sums_are_right(case: str) -> None:
    compute, shapes = CASES[case]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    found = torch.compile(compute, backend=compile_one_row, dynamic=False)(*inputs)
    exact = compute(*(one.double() for one in inputs))
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [None, "fp8", "int4"])
def test_kernels_that_come_early_wait_for_what_they_read(kind: str | None) -> None:
    """Captured steps that follow each other at once, each with an input of its own: nothing of the step before is read."""
    loaded = load_model("nano", dtype="float32", device=torch.device("cuda"), quantization=kind)
    layers = loaded.model.get_submodule("model.layers")

    def blocks(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x

    inputs = torch.randn(300, 1, 1, loaded.shape.hidden_size, device="cuda")
    with torch.inference_mode():
        right = torch.cat([blocks(one) for one in inputs])
        compiled = torch.compile(blocks, backend=compile_one_row, dynamic=False)
        x = inputs[:1, 0].clone()
        found = compiled(x).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.copy_(compiled(x))
        steps = torch.empty_like(right)
        for one, step in zip(inputs, steps, strict=True):
            x.copy_(one)
            graph.replay()
            step.copy_(found[0])
    torch._dynamo.reset()
    torch.testing.assert_close(steps, right, rtol=1e-3, atol=1e-3)
