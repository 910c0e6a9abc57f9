"""On a GPU: latents of DeepSeek's width give the CPU's tokens in float32, eager and captured, and run in bfloat16."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.locations import shape_of
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.random_head import random_head

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
PROMPTS = [[random.Random(seed).randrange(4, 900) for _ in range(length)] for seed, length in enumerate((300, 17, 420))]


@pytest.fixture
def dense(write_family: Callable[..., Path]) -> Path:
    """Without experts, whose products in float32 wait for the GPU."""
    return written(write_family, first_k_dense_replace=99)


@pytest.fixture
def wide(write_family: Callable[..., Path]) -> Path:
    return written(write_family)


def written(write_family: Callable[..., Path], **entries: Any) -> Path:
    folder = write_family("latents", **WIDE, num_attention_heads=20, num_key_value_heads=20, **entries)
    save_head(random_head(shape_of(folder)), folder / "retrieval_head")
    return folder


def tokens(folder: Path, device: str, method: str, offload_layers: int | None, **options: Any) -> tuple[list[list[int]], LLM]:
    config = SpeContextConfig(method=method, budget=64, offload_layers=offload_layers)
    llm = LLM(folder, config=config, device=device, max_num_batched_tokens=256, **options)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    llm.engine.check_integrity()
    return [output.token_ids for output in outputs], llm


@pytest.mark.parametrize("offload_layers", [0, 2, -1])
@pytest.mark.parametrize("method", ["speculative", "full", "oracle"])
def test_the_cpu_s_tokens(method: str, offload_layers: int, dense: Path) -> None:
    expected, _ = tokens(dense, "cpu", method, 0, dtype="float32")
    verified, _ = tokens(dense, "cuda", method, offload_layers, dtype="float32", verify_loads=True)
    captured, llm = tokens(dense, "cuda", method, offload_layers, dtype="float32")
    assert verified == captured == expected
    if method == "speculative":
        assert llm.engine.runner._graphs is not None and llm.engine.runner._graphs._captured


@pytest.mark.parametrize("offload_layers", [0, -1])
@pytest.mark.parametrize("method", ["speculative", "full"])
def test_bfloat16(method: str, offload_layers: int, wide: Path) -> None:
    found, _ = tokens(wide, "cuda", method, offload_layers, dtype="bfloat16")
    eager, _ = tokens(wide, "cuda", method, offload_layers, dtype="bfloat16", enforce_eager=True)
    assert all(len(one) == 40 for one in found + eager)


def test_experts_that_wait_for_the_gpu_are_launched(wide: Path) -> None:
    expected, _ = tokens(wide, "cpu", "speculative", 0, dtype="float32")
    found, llm = tokens(wide, "cuda", "speculative", 0, dtype="float32")
    assert found == expected and not llm.engine.runner.captures
