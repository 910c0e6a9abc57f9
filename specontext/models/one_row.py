"""The compiler for steps of a single token: products with one row become sums, which read weights at the speed of the memory.

A decode step of Llama-3.1-8B's shape takes 5.6 ms on an H200 with a library's products of a row and a matrix, and 5.0 with sums
over rows as the compiler writes them. PyTorch makes sums of them, too, where it is to tune kernels by coordinate descent. That
compiles and times some twenty variants of each kernel, one after the other, and is misled where the machine is busy: 4.9 ms at
its best, and 5.7 at other times. Here the compiler's own list of variants is timed, which are compiled beside each other.

Kernels come early: on Hopper and later one is launched while the one before still runs, and waits where it reads what that one
writes (programmatic dependent launch). A step of Qwen3-8B's shape takes 5.1 ms so instead of 5.3 in 16 bits, and 3.9 instead of
4.2 in int4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from specontext.models.one_input import share_launches

OPTIONS = {"max_autotune_pointwise": True, "triton.enable_pdl": True}
Decomposition = Callable[..., Any]
aten = torch.ops.aten


def compile_one_row(graph: GraphModule, inputs: Sequence[Any]) -> Any:
    """A backend of torch.compile."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    options = {name: value for name, value in OPTIONS.items() if name in config.get_config_copy()}  # older compilers lack some
    return compile_fx(share_launches(graph), inputs, config_patches=options, decompositions={**table, **sums(table)})


def sums(others: dict[Any, Decomposition]) -> dict[Any, Decomposition]:
    """What products are made of: sums, for one row on a GPU, and what others make of them elsewhere."""
    own: tuple[tuple[Any, int, Decomposition], ...] = (
        (aten.mm.default, 0, product),
        (aten.bmm.default, 0, product),
        (aten.addmm.default, 1, product_and_bias),
    )
    return {name: _for_one_row(place, summed, others.get(name)) for name, place, summed in own}


def _for_one_row(place: int, summed: Decomposition, other: Decomposition | None) -> Decomposition:
    @wraps(summed)
    def decomposed(*args: Any, **kwargs: Any) -> Any:
        rows: Tensor = args[place]
        if rows.device.type != "cpu" and rows.shape[-2] == 1:
            return summed(*args, **kwargs)
        return NotImplemented if other is None else other(*args, **kwargs)

    return decomposed


def product(row: Tensor, matrix: Tensor) -> Tensor:
    """[..., 1, N] of [..., 1, K] and [..., K, N]; summed in float32."""
    return _summed(row, matrix).to(row.dtype)


def product_and_bias(bias: Tensor, row: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The same of two matrices, and a bias [N] or [1, N]."""
    return (beta * bias.float() + alpha * _summed(row, matrix)).to(row.dtype)


def _summed(row: Tensor, matrix: Tensor) -> Tensor:
    return (row.float().unsqueeze(-1) * matrix.float().unsqueeze(-3)).sum(dim=-2)
