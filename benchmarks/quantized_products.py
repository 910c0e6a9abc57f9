"""Time of a linear layer's product with quantised weights, beside 16-bit weights and what PyTorch has for the same.

Usage: python benchmarks/quantized_products.py [--device cuda] [--model qwen3-8b] [--rows 1,4,16,1024] [--sweep] [--json]

For each matrix of a layer of the model and each number of rows of x: microseconds of
  16 bits     F.linear in bfloat16
  fp8, int4   our kernels (a scale a row; groups of 128 with zeros)
  scaled_mm   torch._scaled_mm with scales for rows, x rounded to FP8 in the same call
  int4pack    torch._weight_int4pack_mm, groups of 128
each with matrices that take turns, so that none lies in a cache. The last lines sum a layer, and all layers of the model.
--sweep times the kernel for one row with other tiles besides, which is how the ones in use are chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import Timer, interleaved, machine, versions
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specontext.kernels.quantized_linear import FP8, INT4, QuantizedMatrix, product
from specontext.memory.presets import PRESETS
from specontext.quantization.made import FORMS, random_matrix

CACHE = 128 << 20  # bytes of matrices that take turns, more than an L2 cache holds
TILES = [(rows, lanes, warps) for rows in (1, 2, 4, 8) for lanes in (32, 64, 128, 256) for warps in (1, 2, 4, 8)]

Product = Callable[[Tensor], Tensor]


def our_products(kind: str, n: int, k: int, device: torch.device) -> list[Product]:
    return [
        lambda x, matrix=matrix: product(x, matrix, None)  # type: ignore[misc]
        for matrix in our_matrices(kind, n, k, device)
    ]


def our_matrices(kind: str, n: int, k: int, device: torch.device) -> list[QuantizedMatrix]:
    form = FORMS[kind]
    count = copies(form.nbytes(n, k))
    return [random_matrix(form, n, k, deviation=0.02, dtype=torch.bfloat16, device=device) for _ in range(count)]


def copies(size: int) -> int:
    return max(2, -(-CACHE // size))


def plain_products(n: int, k: int, device: torch.device) -> list[Product]:
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device=device) for _ in range(copies(2 * n * k))]
    return [lambda x, weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]  # type: ignore[misc]


def scaled_products(n: int, k: int, device: torch.device) -> list[Product]:
    """PyTorch's scaled product; x is rounded row by row, as W8A8 has it."""
    weights = [torch.randn(n, k, device=device).to(torch.float8_e4m3fn) for _ in range(copies(n * k))]
    scales = torch.full((1, n), 0.02, device=device)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        factor = x.abs().amax(1, keepdim=True).float() / 448
        rounded = (x / factor).to(torch.float8_e4m3fn)
        return torch._scaled_mm(rounded, weight.t(), scale_a=factor, scale_b=scales, out_dtype=torch.bfloat16)

    return [lambda x, weight=weight: multiply(x, weight) for weight in weights]  # type: ignore[misc]


def packed_products(n: int, k: int, device: torch.device) -> list[Product]:
    """PyTorch's product with 4-bit weights."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    weights = [torch._convert_weight_to_int4pack(codes, 8) for _ in range(copies(n * k // 2))]
    tables = torch.rand(k // 128, n, 2, dtype=torch.bfloat16, device=device)
    return [lambda x, weight=weight: torch._weight_int4pack_mm(x, weight, 128, tables) for weight in weights]  # type: ignore[misc]


def seconds(products: list[Product], x: Tensor) -> float:
    """Median seconds of a product, matrices taking turns."""
    return interleaved([Timer([partial(multiply, x) for multiply in products], x.device)], 9)[0]


def times(n: int, k: int, rows: int, device: torch.device) -> dict[str, float | None]:
    makers: dict[str, Callable[[], list[Product]]] = {
        "16 bits": lambda: plain_products(n, k, device),
        "fp8": lambda: our_products(FP8, n, k, device),
        "int4": lambda: our_products(INT4, n, k, device),
        "scaled_mm": lambda: scaled_products(n, k, device),
        "int4pack": lambda: packed_products(n, k, device),
    }
    x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
    found: dict[str, float | None] = {}
    for name, make in makers.items():
        try:
            found[name] = seconds(make(), x)
        except (RuntimeError, NotImplementedError) as error:  # not on this device, or not in this version
            if name in ("16 bits", FP8, INT4):
                raise
            found[name] = None
            print(f"{name}: {str(error).splitlines()[0][:120]}")
    return found


def sweep(kind: str, n: int, k: int, device: torch.device) -> dict[str, float]:
    from specontext.kernels.triton.quantized_linear import Tile, one_row

    x = torch.randn(1, k, dtype=torch.bfloat16, device=device)
    matrices, found = our_matrices(kind, n, k, device), {}
    for rows, lanes, warps in TILES:
        tile = Tile(rows, lanes, warps)
        tiled: list[Product] = [lambda x, m=m, tile=tile: one_row(x, [m], None, tile) for m in matrices]  # type: ignore[misc]
        found[f"{rows} x {lanes} lanes, {warps} warps"] = seconds(tiled, x)
    return dict(sorted(found.items(), key=lambda one: one[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=sorted(PRESETS), default="qwen3-8b")
    parser.add_argument("--rows", default="1,4,16,1024")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device, preset = torch.device(arguments.device), PRESETS[arguments.model]
    results: list[dict[str, Any]] = []
    for rows in map(int, arguments.rows.split(",")):
        known = {shape: times(*shape, rows, device) for shape in dict.fromkeys(preset.matrices_of(0))}
        table = Table(title=f"{arguments.model}, {rows} rows: microseconds")
        for column in ("matrix", *next(iter(known.values()))):
            table.add_column(column, justify="right")
        for (n, k), one in known.items():
            table.add_row(f"{n} x {k}", *("–" if value is None else f"{1e6 * value:.1f}" for value in one.values()))
            results.append({"rows": rows, "n": n, "k": k, "seconds": one})
        layer = {
            name: None
            if any(one[name] is None for one in known.values())
            else sum(known[s][name] or 0.0 for s in preset.matrices_of(0))
            for name in next(iter(known.values()))
        }
        for words, count in (("a layer", 1), ("all layers", preset.layers)):
            table.add_row(words, *("–" if value is None else f"{1e6 * count * value:.0f}" for value in layer.values()))
        Console().print(table)
    if arguments.sweep:
        for kind, shape in itertools.product((FP8, INT4), dict.fromkeys(preset.matrices_of(0))):
            best = list(sweep(kind, *shape, device).items())
            print(kind, shape, "; ".join(f"{name}: {1e6 * value:.1f} us" for name, value in (*best[:5], best[-1])))
    if arguments.json:
        report = {"benchmark": "quantized_products", "date": date.today().isoformat(), "machine": machine(device)}
        print(json.dumps(report | {"versions": versions(), "model": arguments.model, "results": results}))


if __name__ == "__main__":
    main()
