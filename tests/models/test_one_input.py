"""Products of one input, made into one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from specontext.kernels.quantized_linear import FP8, INT4, INT8, QuantizedMatrix, packed
from specontext.models.one_input import PRODUCT, PRODUCTS, share_launches
from specontext.models.one_row import compile_one_row
from specontext.quantization.linear import QuantizedLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K = 128


def layer(
    n: int, kind: str = INT4, rows: int = 1, columns: int = 32, *, zeros: bool = False, bias: bool = False
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 126 if kind == FP8 else 16, (n, K), dtype=torch.uint8, generator=generator)
    table = (-(-n // rows), -(-K // columns))
    scales, points = torch.rand(table, generator=generator), torch.randint(0, 16, table, dtype=torch.uint8, generator=generator)
    held = packed(codes, columns) if kind == INT4 else codes
    matrix = QuantizedMatrix(kind, held, scales, rows, columns, points if zeros else None, 0 if kind == FP8 else 8)
    return QuantizedLinear(matrix, torch.randn(n, generator=generator) if bias else None).to(DEVICE)


def products(compute: Callable[..., object], x: Tensor) -> tuple[list[int], object]:
    """How many matrices each product in the compiled graph has, and what it computes."""
    found: list[int] = []

    def backend(graph: GraphModule, _: object) -> GraphModule:
        nodes = share_launches(graph).graph.nodes
        found.extend(1 if node.target == PRODUCT else len(node.args[1]) for node in nodes if node.target in (PRODUCT, PRODUCTS))
        graph.graph.lint()
        return graph

    made = torch.compile(compute, backend=backend, dynamic=False)(x)
    torch._dynamo.reset()
    return found, made


@pytest.mark.parametrize(
    "layers",
    [
        [layer(48), layer(19), layer(16)],
        [layer(48, zeros=True, bias=True), layer(16, zeros=True, bias=True)],
        [layer(40, INT8, 8, 64), layer(21, INT8, 8, 64)],
        [layer(48, FP8, 48, K), layer(16, FP8, 16, K), layer(90, FP8, 90, K)],
    ],
    ids=["int4", "zeros and biases", "blocks", "a scale for each matrix"],
)
def test_products_that_are_alike_become_one_and_give_the_same(layers: list[QuantizedLinear]) -> None:
    x = torch.randn(1, 1, K, device=DEVICE)
    found, made = products(lambda x: [one(x.sin()) for one in layers], x)
    assert found == [1] * len(layers), "each has an input of its own"

    def compute(x: Tensor) -> list[Tensor]:
        x = x.sin()
        return [one(x) * 2 for one in layers]

    found, made = products(compute, x)
    assert found == [len(layers)]
    for part, right in zip(made, compute(x), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(part, right)


def test_products_that_differ_stay_apart() -> None:
    pairs = list(pairwise([layer(16), layer(16, zeros=True), layer(16, INT8), layer(16, columns=64), layer(16, bias=True)]))
    pairs.append((layer(16, INT8, 8), layer(16, INT8, 4)))
    for pair in pairs:
        assert products(lambda x, pair=pair: [one(x) for one in pair], torch.randn(1, K, device=DEVICE))[0] == [1, 1]  # type: ignore[misc]


def test_orders_of_columns_and_inputs_made_on_the_way_stay_apart() -> None:
    first, second = layer(16), layer(16)
    for one in (first, second):
        one.order = torch.randperm(K, device=DEVICE)
    x = torch.randn(1, K, device=DEVICE)
    assert products(lambda x: (first(x), second(x)), x)[0] == [1, 1]
    plain, scaled = layer(16), layer(16)

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        y = plain(x)
        scaled.bias = y.sum() * scaled.scales[:, 0]
        return y, scaled(x)

    assert products(compute, x)[0] == [1, 1]


@pytest.mark.slow
def test_compiled_for_one_row_they_give_the_same() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = layer(64), layer(64, bias=False)
            self.down = layer(K)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.silu(self.gate(x)) * self.up(x)

    module, x = Gated(), torch.randn(1, 1, K, device=DEVICE)
    found = torch.compile(module, backend=compile_one_row, dynamic=False)(x)
    torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-3)
    torch._dynamo.reset()
