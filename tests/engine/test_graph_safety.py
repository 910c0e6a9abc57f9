"""A decode step can be captured: nothing in it asks the device for a number, or makes shapes of what it finds there.

The step runs on a CPU as it would on a GPU: Triton kernels (in the interpreter), all loads and row numbers as for streams of
their own, padded batches of fixed size. Whatever would wait for a device, or would bring numbers from the host in the middle of
a captured step, raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from transformers import Qwen3MoeConfig
from triton.runtime import interpreter

from specontext import LLM, SpeContextConfig
from specontext.engine.chunk_warm_up import padded_chunk
from specontext.engine.graphs import decode_batch, graph_bytes, requests_bucket, sizes, span_buckets
from specontext.kernels import dispatch
from specontext.quantization.linear import QuantizedExperts
from tests.conftest import write_checkpoint

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures for itself")
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.equal.default,
    aten.lift_fresh.default,  # a constant of the host
}
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class WaitError(AssertionError):
    """Something that cannot be captured."""


class Guard(TorchDispatchMode):
    """Raises for operations that wait, unless the interpreter of kernels does them."""

    inside_a_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not Guard.inside_a_kernel:
            if func in WAITS:
                raise WaitError(f"{func} in a captured step")
            if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
                masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
                if masks:
                    raise WaitError(f"{func} by a mask in a captured step")
        return func(*args, **(kwargs or {}))


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        run = interpreter.GridExecutor.__call__

        def running(self: Any, *args: Any, **kwargs: Any) -> Any:
            Guard.inside_a_kernel = True
            try:
                return run(self, *args, **kwargs)
            finally:
                Guard.inside_a_kernel = False

        patch.setattr(interpreter.GridExecutor, "__call__", running)
        for name in METHODS:
            original = getattr(Tensor, name)

            def checked(self: Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                if not Guard.inside_a_kernel:
                    raise WaitError(f"Tensor.{_name} in a captured step")
                return _original(self, *args, **kwargs)

            patch.setattr(Tensor, name, checked)
        with Guard():
            yield


class SeveralStreams:
    """Streams on which work happens in the order in which it is said."""

    def on(self, stream: str) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, stream: str) -> str:
        return stream

    def wait(self, stream: str, mark: Any) -> None:
        assert mark is not None

    def keep(self, stream: str, *tensors: Tensor) -> None:
        pass


def decoding(llm: LLM, prompts: list[list[int]], params: Any) -> None:
    """Two requests that have decoded a few tokens."""
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)
    for _ in range(5):
        llm.engine.step()
    assert all(request.decoding for request in llm.engine.scheduler.running)


def next_numbers(llm: LLM, size: int) -> Tensor:
    """int64 [5, size] of the next decode step, padded as a captured step is."""
    seats = llm.engine.config.max_num_seqs
    rows = [[r.token_ids[r.computed], r.computed, r.seat, r.computed + 1, r.seed] for r in llm.engine.scheduler.running]
    return torch.tensor(rows + [[0, -1, seats, 0, 0]] * (size - len(rows))).T.contiguous()


def slow(*arguments: Any) -> Any:
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "method", "offload_layers"),
    [
        *((family, "speculative", layers) for family in ("llama", "windows", "latents") for layers in (2, None)),
        *(("llama", "streaming", layers) for layers in (2, None)),
        *(slow(family, "speculative", -1) for family in ("llama", "windows", "latents", "bands", "delta")),
        *(slow(family, "speculative", 0) for family in ("llama", "conv", "shared")),
        *(slow(family, "speculative", 2) for family in ("bands", "conv", "shared")),
        slow("delta", "speculative", None),
    ],
)  # random's scores are float64, which Triton's top-k is not for
def test_a_padded_decode_step_never_waits_and_computes_the_same(
    family: str,
    method: str,
    offload_layers: int | None,
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    greedy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"budget": 12, "offload_layers": offload_layers, "max_num_seqs": 5, "slots": 14}
    plain, captured = (make_llm(family, method, **options) for _ in range(2))
    for llm in (plain, captured):
        decoding(llm, prompts[1:3], greedy())
    size = requests_bucket(3, 5)
    assert size == 4
    expected = plain.engine.runner.run(decode_batch(next_numbers(plain, 2), 90))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    captured.engine.parts.kv.transfers.run_on(SeveralStreams())
    batch = decode_batch(next_numbers(captured, size), min(4096, captured.engine.parts.max_tokens))
    with torch.inference_mode(), guarded(monkeypatch):
        logits = captured.engine.runner._forward(batch)
    assert logits.shape[0] == size
    torch.testing.assert_close(logits[:2], expected, rtol=1e-4, atol=1e-4)
    monkeypatch.delenv(dispatch.VARIABLE)
    captured.engine.check_integrity()
    kv, other = captured.engine.parts.kv, plain.engine.parts.kv
    assert not kv.arena.rows[: kv.arena.page_rows].any(), "padding wrote to the page of nobody"
    for layer in kv.offloaded:
        for seat in (0, 1):
            pages = [kv_.transfers.tiers.host for kv_ in (kv, other)]
            rows = [one.rows_of(layer, torch.tensor([seat]), torch.arange(40)[None, None]) for one in pages]
            torch.testing.assert_close(kv.host.rows[rows[0]], other.host.rows[rows[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "offload_layers", "tiers", "kind"),
    [
        ("speculative", None, "kv_cache_dtype", "fp8"),
        ("full", 0, "kv_cache_dtype", "int8"),
        ("speculative", 2, "host_kv_dtype", "int8"),
        slow("quest", 0, "kv_cache_dtype", "fp8"),
        slow("speculative", -1, "kv_cache_dtype", "int8"),
        slow("speculative", -1, "host_kv_dtype", "fp8"),
    ],
)
def test_a_step_with_kv_in_8_bits_never_waits(
    method: str,
    offload_layers: int | None,
    tiers: str,
    kind: str,
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    greedy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"budget": 24, "offload_layers": offload_layers, "max_num_seqs": 5, tiers: kind, "enable_prefix_caching": False}
    plain, captured = (make_llm("llama", method, **options) for _ in range(2))
    for llm in (plain, captured):
        decoding(llm, prompts[1:3], greedy())
    expected = plain.engine.runner.run(decode_batch(next_numbers(plain, 2), 90))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    captured.engine.parts.kv.transfers.run_on(SeveralStreams())
    batch = decode_batch(next_numbers(captured, 4), 512)
    with torch.inference_mode(), guarded(monkeypatch):
        logits = captured.engine.runner._forward(batch)
    # A sum that is rounded otherwise in a batch of four may turn a code into its neighbour.
    assert (logits[:2] - expected).abs().max() < 0.05 * expected.abs().max()
    captured.engine.check_integrity()
    kv = captured.engine.parts.kv
    assert not kv.arena.rows.view(-1).view(torch.uint8)[: kv.arena.page_bytes].any(), "padding wrote to the page of nobody"


@pytest.mark.slow
def test_a_step_whose_experts_keep_codes_never_waits(
    tmp_path: Path, tokenizer: Any, prompts: list[list[int]], greedy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever experts its tokens choose, those of padding among them."""
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": len(tokenizer)}
    folder = write_checkpoint(tmp_path, Qwen3MoeConfig(**sizes, **routed), None, tokenizer)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_num_seqs": 5, "quantization": "int4"}
    plain, captured = (LLM(folder, config=SpeContextConfig(method="full"), **options) for _ in range(2))
    assert any(isinstance(module, QuantizedExperts) for module in captured.engine.loaded.model.modules())
    for llm in (plain, captured):
        decoding(llm, prompts[1:3], greedy())
    expected = plain.engine.runner.run(decode_batch(next_numbers(plain, 2), 90))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    captured.engine.parts.kv.transfers.run_on(SeveralStreams())
    batch = decode_batch(next_numbers(captured, 4), 512)
    with torch.inference_mode(), guarded(monkeypatch):
        logits = captured.engine.runner._forward(batch)
    torch.testing.assert_close(logits[:2], expected, rtol=1e-4, atol=1e-4)
    captured.engine.check_integrity()


@pytest.mark.parametrize("offload_layers", [0, 2, None])
def test_a_chunk_of_padding_stores_nothing(
    offload_layers: int | None, make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs before an engine is ready, on streams and with the kernels of a GPU."""
    llm = make_llm("llama", budget=12, offload_layers=offload_layers, max_num_seqs=2)
    kv = llm.engine.parts.kv
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    kv.transfers.run_on(SeveralStreams())
    pools = [pool.rows.view(torch.int32) for pool in (kv.arena, kv.host)]
    before = [rows.clone() for rows in pools]
    with torch.inference_mode():
        for start in (0, 20):
            logits = llm.engine.runner._forward(padded_chunk(20, start, kv.num_seats, kv.device))
            assert logits.isfinite().all()
    monkeypatch.delenv(dispatch.VARIABLE)
    assert all(torch.equal(rows, old) for rows, old in zip(pools, before, strict=True))
    llm.engine.check_integrity()


@pytest.mark.parametrize(
    "method", ["full", "oracle", *(pytest.param(name, marks=pytest.mark.slow) for name in ("quest", "shadowkv", "h2o"))]
)
def test_methods_that_look_at_each_layer_never_wait_on_the_device(
    method: str,
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    greedy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, captured = (make_llm("llama", method, budget=24, offload_layers=0) for _ in range(2))
    for llm in (plain, captured):
        decoding(llm, prompts[1:3], greedy())
    assert not captured.engine.parts.selector.asks_host
    expected = plain.engine.runner.run(decode_batch(next_numbers(plain, 2), 90))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    captured.engine.parts.kv.transfers.run_on(SeveralStreams())
    batch = decode_batch(next_numbers(captured, 4), 512)
    with torch.inference_mode(), guarded(monkeypatch):
        logits = captured.engine.runner._forward(batch)
    torch.testing.assert_close(logits[:2], expected, rtol=1e-4, atol=1e-4)
    captured.engine.check_integrity()


def test_methods_that_need_positions_on_the_host_say_so(
    make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., Any]
) -> None:
    for method in ("clusterkv", "snapkv"):
        llm = make_llm("llama", method, budget=24, offload_layers=0)
        decoding(llm, prompts[1:2], greedy())
        assert llm.engine.parts.selector.asks_host
    llm = make_llm("llama", "quest", budget=24, offload_layers=0)
    assert not llm.engine.parts.selector.asks_host
    llm.engine.add_request("new", prompts[0], greedy())
    llm.engine.step()
    assert llm.engine.parts.selector.asks_host, "its state is built in the first decode step"


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.ones(3).sum().item(),
        lambda: bool(torch.ones(()) > 0),
        lambda: torch.ones(3).nonzero(),
        lambda: torch.ones(3)[torch.ones(3, dtype=torch.bool)],
        lambda: torch.tensor([1, 2]),
        lambda: torch.ones(3).tolist(),
    ],
)
def test_the_guard_notices(wait: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WaitError), guarded(monkeypatch):
        wait()


def test_sizes_of_captured_steps() -> None:
    assert [requests_bucket(n, 20) for n in (1, 2, 3, 5, 8, 9, 16, 17, 20)] == [1, 2, 4, 8, 8, 16, 16, 20, 20]
    assert sizes(20) == [1, 2, 4, 8, 16, 20] and sizes(1) == [1]
    for seats in (1, 7, 16, 33, 100, 256):
        for requests in range(1, seats + 1):
            assert requests <= requests_bucket(requests, seats) < max(requests + 8, 1.5 * requests)
    assert sizes(256)[-3:] == [128, 192, 256] and len(sizes(256)) < 16


def test_spans_of_captured_steps() -> None:
    """Within the budget nothing is scored, and this is the shortest span."""
    assert span_buckets(2048, 50_000) == [2048, 4096, 8192, 16384, 32768, 50_000]
    assert span_buckets(6000, 32768) == [6000, 8192, 16384, 32768]
    assert span_buckets(256, 4096) == [256, 4096]
    assert span_buckets(2048, 512) == [512]
    few, many = (graph_bytes(16, spans, layers=32, vocab_size=1000, itemsize=2) for spans in (1, 7))
    assert many - few == 6 * len(sizes(16)) * 32 * (256 << 10)
