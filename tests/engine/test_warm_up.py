"""What an engine does before it is ready, so that no request waits for it, leaves nothing behind."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from specontext import LLM, SamplingParams
from specontext.core import Batch
from specontext.engine import chunk_graphs, runner
from specontext.engine.chunk_warm_up import padded_chunk
from specontext.engine.graphs import sizes
from specontext.engine.rehearsal import rehearse
from specontext.gguf import cache
from specontext.kv.cache import KVCache
from specontext.models.compiled import CompiledModules, keep_compiled
from specontext.models.decoder import decoder_layers
from specontext.retrieval.head import CALLED
from specontext.retrieval.registry import CHOICES

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Change = Callable[[LLM], Any]


@pytest.mark.parametrize("offload_layers", [0, 2, None])
@pytest.mark.parametrize("method", ["speculative", "full", "h2o", "snapkv"])
def test_a_chunk_of_padding_stores_nothing(method: str, offload_layers: int | None, make_llm: MakeLLM) -> None:
    llm = make_llm("llama", method, budget=24, offload_layers=offload_layers)
    parts, steps = llm.engine.parts, llm.engine.runner
    pools = [pool.rows.view(torch.int32) for pool in (parts.kv.arena, parts.kv.host)]  # memory that may hold anything
    before = [rows.clone() for rows in pools]
    with torch.inference_mode():
        for start in (0, 40):
            logits = steps._forward(padded_chunk(40, start, parts.kv.num_seats, parts.kv.device))
            assert logits.shape == (1, llm.shape.vocab_size) and logits.isfinite().all()
    assert all(torch.equal(rows, old) for rows, old in zip(pools, before, strict=True))
    llm.engine.check_integrity()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("speculative", {}),
        ("speculative", {"offload_layers": None, "gpu_memory": 70_000}),
        ("full", {"max_num_seqs": 1}),
        ("quest", {"methods": tuple(name for name in ("h2o", "speculative") if name in CHOICES)}),
        ("speculative", {"max_model_len": 12}),
    ],
)
def test_a_rehearsal_is_forgotten(method: str, options: dict[str, Any], make_llm: MakeLLM, prompts: Any, greedy: Greedy) -> None:
    plain, rehearsed = (make_llm("llama", method, **{"budget": 24} | options) for _ in range(2))
    rehearse(rehearsed.engine)
    parts = rehearsed.engine.parts
    assert not rehearsed.engine.has_work and not parts.prefix.pages and not parts.residency.num_moves
    assert parts.prefix.queries == parts.prefix.hits == rehearsed.engine.scheduler.preemptions == 0
    assert not any(parts.meter.overview([])[1])
    rehearsed.engine.check_integrity()
    if options.get("max_model_len"):
        return
    sampled = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True)
    found = [[one.token_ids for one in llm.generate(prompts[:2], [greedy(6), sampled])] for llm in (plain, rehearsed)]
    assert found[0] == found[1], "seeds of requests that name none go on from where they began"


@pytest.mark.parametrize("method", ["speculative", "full"])
def test_layers_move_in_a_rehearsal_and_come_back(method: str, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the first real move finds its kernels compiled, whatever runs; where layers stay none moves."""
    llm, fixed = make_llm("llama", method, budget=24), make_llm("llama", method, budget=24, offload_layers=1)
    seen: list[tuple[int, bool]] = []
    finish = KVCache.finish_move

    def finishing(self: KVCache, stored: Any) -> bool:
        assert self.move is not None
        seen.append((len(stored), self.move.to_host))
        return finish(self, stored)

    monkeypatch.setattr(KVCache, "finish_move", finishing)
    rehearse(fixed.engine)
    assert not seen and len(fixed.engine.parts.kv.offloaded) == 1
    rehearse(llm.engine)
    assert [to_host for _, to_host in seen] == [True, False] * 3 and {1, 2} <= {count for count, _ in seen}
    assert llm.engine.parts.kv.offloaded == [] and not llm.engine.parts.residency.num_moves
    llm.engine.check_integrity()


def test_a_model_whose_logits_are_broken_is_found_by_those_who_ask(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm("llama")
    run = llm.engine.runner.run
    monkeypatch.setattr(llm.engine.runner, "run", lambda batch: run(batch) * torch.nan)
    rehearse(llm.engine)
    assert not llm.engine.has_work
    llm.engine.check_integrity()


@pytest.mark.parametrize(("method", "spans"), [("speculative", [24, 300]), ("full", [300]), ("streaming", [300])])
def test_all_sizes_and_spans_are_captured_before_requests_come(
    method: str, spans: list[int], make_llm: MakeLLM, prompts: Any, greedy: Greedy, as_if_captured: Change
) -> None:
    llm = make_llm("llama", method, budget=24, offload_layers=0, max_model_len=300, max_num_seqs=5)
    graphs = as_if_captured(llm)
    llm.engine.warm_up()
    captured = [*graphs._captured]
    assert {(kind.size, kind.span) for kind in captured} == {(size, span) for size in sizes(5) for span in spans}
    assert [kind.span for kind in captured if kind.size == 5] == spans[::-1], "those that need most memory first"
    graphs.replayed.clear()
    llm.generate(prompts, greedy(24))
    llm.generate(prompts[0], greedy(6))
    assert sorted(map(str, graphs._captured)) == sorted(map(str, captured)), "none is missing"
    assert {kind.span for kind in graphs.replayed} == {*spans}


def test_kernels_are_compiled_before_others_are_timed(
    make_llm: MakeLLM, as_if_captured: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that goes on beside them would have the wrong ones chosen. Those of methods that requests may name are, too."""
    happened: list[str] = []
    choices: list[str | None] = []

    class Compilers:
        def __init__(self, device: torch.device) -> None: ...

        def __enter__(self) -> Compilers:
            return self

        def __exit__(self, *_: object) -> None:
            happened.append("compiled")

        def walk(self, step: partial[object]) -> bool:
            step()
            happened.append("walked")
            if isinstance(step.args[0], Batch):  # else it chooses tokens
                [lane] = step.args[0].lanes
                choices.append(lane.choice and lane.choice.method)
            return True

    monkeypatch.setattr(runner, "Compilers", Compilers)
    llm = make_llm("llama", budget=24, offload_layers=0, max_model_len=300, max_num_seqs=5, methods=("quest", "clusterkv"))
    graphs = as_if_captured(llm)
    capture, fused = graphs._capture, llm.engine.runner._fused
    monkeypatch.setattr(graphs, "_capture", lambda *given: (happened.append("captured"), capture(*given))[1])
    monkeypatch.setattr(llm.engine.runner, "_fused", lambda batch: (happened.append("run"), fused(batch))[1])
    llm.engine.warm_up()
    each = len(sizes(5)) + 1  # all sizes, and the other span
    assert choices == [None] * each + ["quest"] * each, "clusters are made by the host"
    walks = 2 * each + 1
    assert happened[: walks + 2] == ["walked"] * walks + ["compiled", "run"] and "captured" in happened
    assert happened.count("walked") == walks and happened.count("compiled") == 1


class CountingCompiler:
    """A compiler that makes no code, and counts what it would make code of."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.graphs = 0
        compiler = torch.compile
        patch.setattr(torch, "compile", lambda function, **given: compiler(function, **given | {"backend": self}))

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_nothing_is_compiled_once_an_engine_is_ready(
    family: str, make_llm: MakeLLM, greedy: Greedy, as_if_captured: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lengths prompts have, alone, several in a step or beside decode tokens, and whatever is known of them."""
    monkeypatch.setattr(chunk_graphs, "QUERIES", 64)  # longer chunks than these, and than those of a rehearsal, run compiled
    llm = make_llm(family, budget=24, offload_layers=0, max_model_len=300, max_num_seqs=4, max_num_batched_tokens=128)
    steps, compiler = llm.engine.runner, CountingCompiler(monkeypatch)
    layers, own = decoder_layers(steps.loaded.model), steps.parts.head
    steps._compiled = CompiledModules([*((layer, "forward") for layer in layers), *((own, name) for name in CALLED)])
    as_if_captured(llm)
    torch._dynamo.reset()
    llm.engine.warm_up()
    assert (ready := compiler.graphs) > 0
    numbers = random.Random(0)

    def prompt(tokens: int) -> list[int]:
        return [numbers.randrange(3, 60) for _ in range(tokens)]

    known = prompt(150)
    for lengths in ((100,), (128,), (65,), (150, 30, 29, 1), (91, 77, 160, 25), (33,)):
        llm.generate([prompt(length) for length in lengths], greedy(7))
    llm.generate([known], greedy(2))
    llm.generate([known[:80] + prompt(50), known + prompt(26), prompt(90)], greedy(5))
    assert compiler.graphs == ready
    torch._dynamo.reset()


def test_compilers_keep_what_they_made_where_nobody_has_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor") and os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
