"""What ranks have of quantised weights is what the whole has there, number for number, and nothing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.engine.build import facts_of_loaded
from specontext.kernels.dispatch import VARIABLE
from specontext.kernels.quantized_linear import FP8, INT4, INT8, QuantizedMatrix, dequantized, packed
from specontext.memory.sharing import Share
from specontext.models.loading import LoadedModel, load_model
from specontext.models.rank_layers import SummedLinear
from specontext.models.ranks import Ranks
from specontext.quantization.linear import QuantizedLinear
from specontext.quantization.parts import joined, some_columns, some_rows
from tests.models.quantised_files import FORMATS, Tensors, write_quantised

CPU = torch.device("cpu")
LAYER = "model.layers.1"
WRITTEN_OUT = ("fp8-blocks", "fbgemm", "ct-zeros", "gptq-order", "awq", "bnb-4")  # one of each way in which codes are stored


@st.composite
def matrices(draw: st.DrawFn) -> QuantizedMatrix:
    """Of every kind, with a scale for all, for rows, for blocks that end anywhere, or for groups of a row."""
    n, k = draw(st.integers(2, 9)) * draw(st.sampled_from([1, 7, 16])), 32 * draw(st.integers(2, 9))
    kind = draw(st.sampled_from([FP8, INT8, INT4]))
    rows = draw(st.sampled_from([1, 5, 32, n]))
    columns = draw(st.sampled_from([size for size in (32, 64, 128, k) if k % size == 0]))
    table, chance = (-(-n // rows), -(-k // columns)), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    codes = torch.randint(0, 16 if kind == INT4 else 120, (n, k), dtype=torch.uint8, generator=chance)
    zeros = torch.randint(0, 16, table, dtype=torch.uint8, generator=chance) if kind != FP8 and draw(st.booleans()) else None
    scales = torch.rand(table, generator=chance) + 0.5
    return QuantizedMatrix(kind, packed(codes, columns) if kind == INT4 else codes, scales, rows, columns, zeros, 8)


@given(matrices(), st.data())
def test_rows(matrix: QuantizedMatrix, data: st.DataObject) -> None:
    """Also pieces of several lengths, as of queries, keys and values."""
    edges = sorted(data.draw(st.sets(st.integers(0, matrix.shape[0]), min_size=2, max_size=6)))
    pieces = [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=False)]
    whole = dequantized(matrix, torch.float32)
    assert torch.equal(dequantized(some_rows(matrix, pieces), torch.float32), torch.cat([whole[piece] for piece in pieces]))


@given(matrices(), st.data())
def test_columns(matrix: QuantizedMatrix, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 3, 4]))
    width = matrix.shape[1] // size
    start = data.draw(st.integers(0, size - 1)) * width
    own = slice(start, start + width)
    part = some_columns(matrix, own)
    if part is None:  # groups that are too narrow
        assert width % 32 or (matrix.columns < matrix.shape[1] and start % 32)
    else:
        assert part.group and torch.equal(dequantized(part, torch.float32), dequantized(matrix, torch.float32)[:, own])


def test_columns_in_another_order_are_left_to_be_written_out() -> None:
    order = torch.arange(64).flip(0)
    matrix = QuantizedMatrix(FP8, torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1), 1, 64, order=order)
    assert some_columns(matrix, slice(0, 32)) is None
    assert torch.equal(some_rows(matrix, [slice(1, 3)]).order, order)  # type: ignore[arg-type]


@given(matrices(), st.integers(2, 3), st.booleans())
def test_matrices_one_below_the_other(matrix: QuantizedMatrix, count: int, mixed: bool) -> None:
    others = [matrix] * (count - 1)
    if mixed:  # the zero of all is written down once, and for each scale elsewhere
        offset = torch.full_like(matrix.scales, matrix.offset, dtype=torch.uint8)
        others = [replace(matrix, zeros=offset if matrix.zeros is None and matrix.kind != FP8 else None), *others[1:]]
    whole = joined([matrix, *others])
    assert whole is not None and matrix.shape[0] % whole.rows == 0
    expected = torch.cat([dequantized(one, torch.float32) for one in (matrix, *others)])
    assert torch.equal(dequantized(whole, torch.float32), expected)


def test_matrices_that_do_not_go_together() -> None:
    def made(kind: str, k: int, columns: int, **others: torch.Tensor) -> QuantizedMatrix:
        return QuantizedMatrix(kind, torch.zeros(4, k, dtype=torch.uint8), torch.ones(4, k // columns), 1, columns, **others)

    first, turned = made(FP8, 64, 64), made(FP8, 64, 64, order=torch.arange(64).flip(0))
    assert joined([first, first]) is not None
    for other in (made(FP8, 96, 96), made(INT8, 64, 64), made(FP8, 64, 32), turned):
        assert joined([first, other]) is None


@pytest.fixture
def write(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, Tensors]]:
    def make(name: str) -> tuple[Path, Tensors]:
        return tmp_path / name, write_quantised(checkpoint("llama"), tmp_path / name, FORMATS[name])

    return make


def parts_of(folder: Path, size: int, **options: Any) -> list[LoadedModel]:
    return [load_model(folder, dtype="float32", device=CPU, ranks=Ranks(Share(rank, size)), **options) for rank in range(size)]


def weight_of(module: Any) -> torch.Tensor:
    module = module.part if isinstance(module, SummedLinear) else module
    return dequantized(module.matrix, torch.float32) if isinstance(module, QuantizedLinear) else module.weight


@pytest.mark.parametrize(("name", "kept"), [*((name, True) for name in FORMATS), *((name, False) for name in WRITTEN_OUT)])
def test_ranks_have_the_rows_and_columns_of_the_whole(write: Any, name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = write(name)
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: kept)
    parts = parts_of(folder, 2)
    for path, dim in (("self_attn.q_proj", 0), ("self_attn.o_proj", 1), ("mlp.gate_proj", 0), ("mlp.down_proj", 1)):
        modules = [part.model.get_submodule(f"{LAYER}.{path}") for part in parts]
        found = torch.cat([weight_of(module) for module in modules], dim=dim)
        torch.testing.assert_close(found, dense[f"{LAYER}.{path}.weight"], rtol=2e-7, atol=1e-8)
        if path.startswith("self_attn.q"):
            assert all(isinstance(module, QuantizedLinear) for module in modules) == (kept and FORMATS[name].kept)
    assert FORMATS[name].said in str(parts[1].weights_note)


@pytest.mark.parametrize("quantization", ["fp8", "int4"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_part_is_as_large_as_planned(quantization: str, load_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    options: dict[str, Any] = {"quantization": quantization, "load_format": load_format}
    whole = load_model("nano", dtype="bfloat16", device=CPU, **options)
    part = load_model("nano", dtype="bfloat16", device=CPU, ranks=Ranks(Share(1, 2)), **options)
    planned = Share(1, 2).facts(facts_of_loaded(whole, None))
    found = facts_of_loaded(replace(part, shape=planned.shape), None)
    assert found.parameters == planned.parameters
    assert found.weight_bytes == pytest.approx(planned.weight_bytes, rel=0.01)
    assert found.weight_bytes < 0.8 * whole.weight_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("name", ["fp8-blocks", "awq", "gptq-order"])
def test_tokens_are_those_of_one_process(write: Any, name: str) -> None:
    _same_tokens(write(name)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("quantization", ["fp8", "int4"])
def test_tokens_of_rounded_weights(quantization: str, checkpoint: Any) -> None:
    _same_tokens(checkpoint("llama"), quantization=quantization)


@pytest.mark.parametrize("name", ["fp8-blocks", "ct-int8", "ct-zeros", "awq"])
@pytest.mark.parametrize("rows", [1, 3])
def test_kernels_multiply_parts(write: Any, name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = write(name)
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    layers = [part.model.get_submodule(LAYER) for part in parts_of(folder, 2)]
    monkeypatch.setenv(VARIABLE, "triton")
    for path in ("self_attn.q_proj", "self_attn.o_proj"):
        weight, modules = dense[f"{LAYER}.{path}.weight"], [layer.get_submodule(path) for layer in layers]
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0))
        if path.endswith("q_proj"):
            found = torch.cat([module(x) for module in modules], dim=1)
        else:
            found = sum(module.part(part) for module, part in zip(modules, x.chunk(2, dim=1), strict=True))
        torch.testing.assert_close(found, x @ weight.T, rtol=1e-4, atol=1e-4)


def _same_tokens(model: Path, **options: Any) -> None:
    options |= {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2}
    config, greedy = (
        SpeContextConfig(method="full", offload_layers=1),
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    )
    expected = LLM(model, config=config, **options).generate([[*range(4, 40)]], greedy)[0].token_ids
    llm = LLM(model, config=config, tensor_parallel_size=2, **options)
    try:
        assert llm.generate([[*range(4, 40)]], greedy)[0].token_ids == expected
    finally:
        llm.engine.close()
