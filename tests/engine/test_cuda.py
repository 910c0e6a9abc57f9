"""On a GPU: `nano` gives the CPU's tokens in float32, eager and captured, wherever its KV lives and while it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.engine import build
from specontext.evaluation.token_counter import token_counter
from specontext.models.loading import LoadedModel, load_model
from specontext.tasks import sample_problems

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def loaded() -> dict[str, LoadedModel]:
    return {name: load_model("nano", dtype="auto", device=torch.device(name)) for name in ("cpu", "cuda")}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Chains of variables and programs, of two lengths."""
    kinds = (("variable_tracking", 3000), ("program", 512))
    count = token_counter("nano")
    drawn = [sample_problems(kind, length=length, seed=7, n=2, count_tokens=count) for kind, length in kinds]
    return [problem.prompt for problems in drawn for problem in problems]


@pytest.fixture(scope="module")
def tokens(loaded: dict[str, LoadedModel], prompts: list[str]) -> Callable[..., tuple[list[list[int]], LLM]]:
    def run(device: str, method: str, *, offload_layers: int | None = 0, **options: Any) -> tuple[list[list[int]], LLM]:
        config = SpeContextConfig(method=method, budget=256, offload_layers=offload_layers)
        llm = LLM(loaded[device], config=config, max_model_len=8192, **options)
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=330))
        llm.engine.check_integrity()
        return [output.token_ids for output in outputs], llm

    return run


@pytest.mark.parametrize("offload_layers", [0, 2, -1])
@pytest.mark.parametrize("method", ["speculative", "full"])
def test_captured_steps_give_the_cpu_s_tokens(method: str, offload_layers: int, tokens: Any) -> None:
    expected, _ = tokens("cpu", method)
    found, llm = tokens("cuda", method, offload_layers=offload_layers)
    assert found == expected
    assert bool(llm.engine.runner._graphs._captured) == (method == "speculative" or offload_layers == 0)


@pytest.mark.parametrize("method", ["speculative", "oracle"])
def test_eager_steps_with_every_load_verified(method: str, tokens: Any) -> None:
    expected, _ = tokens("cpu", method)
    assert tokens("cuda", method, offload_layers=-1, enforce_eager=True, verify_loads=True)[0] == expected


@pytest.mark.parametrize("megabytes", [6, 12])
@pytest.mark.parametrize("method", ["speculative", "full"])
def test_layers_move_under_captured_steps(method: str, megabytes: int, tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = tokens("cpu", method)
    monkeypatch.setattr(build, "device_memory", lambda *_: megabytes * 1_000_000)
    found, llm = tokens("cuda", method, offload_layers=None)
    assert found == expected
    assert llm.engine.parts.residency.moves


def test_memory_is_what_was_planned() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    llm = LLM("nano", device="cuda", gpu_memory=1 << 30, enforce_eager=True)
    llm.generate([[7] * 9000], SamplingParams(temperature=0, max_tokens=20))
    assert torch.cuda.max_memory_allocated() <= 1 << 30
