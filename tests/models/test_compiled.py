"""Compiled functions stand at modules while a step runs, and at no other time; they give what modules give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.core import Batch
from specontext.engine.runner import ModelRunner
from specontext.models.compiled import CompiledModules
from specontext.models.decoder import decoder_layers
from specontext.retrieval.head import CALLED
from tests.models.architectures import RUN
from tests.models.conftest import Write

SOME = ("GPT2", "Gemma2", "Cohere2", "DeepseekV2", "Lfm2", "Qwen3Moe", "GptOss", "Phi3")
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


class Counting:
    """A compiler that makes no code, and counts what it would make code of; nothing of it stays."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.graphs = 0
        compiler = torch.compile
        patch.setattr(torch, "compile", lambda function, **given: compiler(function, **given | {"backend": self}))

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name == "Gemma2" else pytest.mark.slow) for name in SOME]
)
def test_compiled_layers_give_what_layers_give(
    architecture: str, write: Write, tmp_path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(architecture, RUN[architecture])
    llm = LLM(tmp_path, config=SpeContextConfig(budget=24, sink=2, recent=4, offload_layers=-1), device="cpu")
    several, alone = prompts[1:3], prompts[2:3]
    right = [one.token_ids for asked in (several, alone) for one in llm.generate(asked, PARAMS)]
    torch._dynamo.reset()
    runner, forward, compiler = llm.engine.runner, ModelRunner._forward, Counting(monkeypatch)
    layers, head = decoder_layers(runner.loaded.model), runner.parts.head
    assert head is not None
    modules = CompiledModules([*((layer, "forward") for layer in layers), *((head, name) for name in CALLED)])

    def compiled(self: ModelRunner, batch: Batch) -> Tensor:  # as captured steps are, for which it takes a GPU
        with modules.use(len(batch.token_ids)):
            return forward(self, batch)

    monkeypatch.setattr(ModelRunner, "_forward", compiled)
    assert [one.token_ids for asked in (several, alone) for one in llm.generate(asked, PARAMS)] == right
    assert compiler.graphs, "nothing was compiled"
    if architecture == "Gemma2" and hasattr(torch._dynamo.config, "nested_graph_breaks"):
        assert compiler.graphs <= 12, "15 where each function between a layer and its attention has pieces of its own"
    torch._dynamo.reset()


def test_what_stood_at_a_module_stands_there_again() -> None:
    plain, patched = nn.Linear(2, 2), nn.Linear(2, 2)
    own = lambda states: states  # noqa: E731
    patched.forward = own  # type: ignore[method-assign]
    modules = CompiledModules([(plain, "forward"), (patched, "forward")])
    for _ in range(2):
        with modules.use(1):
            assert vars(plain)["forward"] is not own and vars(patched)["forward"] is not own
        assert "forward" not in vars(plain) and vars(patched)["forward"] is own
