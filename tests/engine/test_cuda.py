"""On a GPU: `nano` gives the CPU's tokens in float32, eager and captured, wherever its KV lives and while it moves."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.core import Batch
from specontext.engine import build
from specontext.engine.graphs import NAMED
from specontext.errors import DeviceMemoryError
from specontext.evaluation.token_counter import token_counter
from specontext.models.loading import LoadedModel, load_model
from specontext.tasks import sample_problems

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def loaded() -> dict[str, LoadedModel]:
    return {name: load_model("nano", dtype="auto", device=torch.device(name)) for name in ("cpu", "cuda")}


def prompts_of(*kinds: tuple[str, int], each: int) -> list[str]:
    """Problems of some kinds and lengths."""
    count = token_counter("nano")
    drawn = [sample_problems(kind, length=length, seed=7, n=each, count_tokens=count) for kind, length in kinds]
    return [problem.prompt for problems in drawn for problem in problems]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Chains of variables and programs, of two lengths."""
    return prompts_of(("variable_tracking", 3000), ("program", 512), each=2)


@pytest.fixture(scope="module")
def programs() -> list[str]:
    """Programs with outputs of more than half their length."""
    return prompts_of(("program", 512), each=4)


@pytest.fixture(scope="module")
def tokens(loaded: dict[str, LoadedModel], prompts: list[str]) -> Callable[..., tuple[list[list[int]], LLM]]:
    def run(
        device: str, method: str, *, offload_layers: int | None = 0, ask: list[str] = prompts, **options: Any
    ) -> tuple[list[list[int]], LLM]:
        config = SpeContextConfig(method=method, budget=256, offload_layers=offload_layers)
        llm = LLM(loaded[device], config=config, max_model_len=8192, **options)
        outputs = llm.generate(ask, SamplingParams(temperature=0, max_tokens=330))
        llm.engine.check_integrity()
        return [output.token_ids for output in outputs], llm

    return run


@pytest.fixture(scope="module")
def expected_of(tokens: Callable[..., tuple[list[list[int]], LLM]]) -> Callable[..., list[list[int]]]:
    """The CPU's tokens, which several tests ask for: computed once."""
    known: dict[str, list[list[int]]] = {}

    def of(method: str, **options: Any) -> list[list[int]]:
        asked = f"{method} {sorted(options.items())}"
        if asked not in known:
            known[asked], _ = tokens("cpu", method, **options)
        return known[asked]

    return of


@pytest.mark.parametrize("offload_layers", [0, 2, -1])
@pytest.mark.parametrize("method", ["speculative", "full"])
def test_captured_steps_give_the_cpu_s_tokens(method: str, offload_layers: int, tokens: Any, expected_of: Any) -> None:
    expected = expected_of(method)
    found, llm = tokens("cuda", method, offload_layers=offload_layers)
    assert found == expected
    assert bool(llm.engine.runner._graphs._captured) == (method == "speculative" or offload_layers == 0)


@pytest.mark.parametrize("count", [9, 13, 31])
def test_any_number_of_requests_reads_from_the_host(count: int, loaded: dict[str, LoadedModel]) -> None:
    prompts = [[7 + (place * (number + 3)) % 900 for place in range(500 + 20 * number)] for number in range(count)]
    found = []
    for device in ("cpu", "cuda"):
        config = SpeContextConfig(budget=128, offload_layers=-1)
        llm = LLM(loaded[device], config=config, max_model_len=2048)
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        llm.engine.check_integrity()
        found.append([output.token_ids for output in outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("method", "offload_layers"), [("speculative", 0), ("speculative", -1), ("full", 2)])
def test_kv_in_8_bits_gives_the_cpu_s_tokens(method: str, offload_layers: int, kind: str, tokens: Any, expected_of: Any) -> None:
    """Of most problems: a sum that a GPU rounds otherwise may turn a code into its neighbour."""
    expected = expected_of(method, kv_cache_dtype=kind)
    found, llm = tokens("cuda", method, offload_layers=offload_layers, kv_cache_dtype=kind)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 3
    assert bool(llm.engine.runner._graphs._captured) == (method == "speculative" or offload_layers == 0)
    assert llm.engine.parts.kv.arena.rows.itemsize == 1


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("method", "offload_layers"), [("speculative", -1), ("speculative", 2), ("full", 2)])
def test_a_host_in_8_bits_gives_the_cpu_s_tokens(
    method: str, offload_layers: int, kind: str, tokens: Any, expected_of: Any
) -> None:
    options = {"offload_layers": offload_layers, "host_kv_dtype": kind, "enable_prefix_caching": False}
    expected = expected_of(method, **options)
    found, llm = tokens("cuda", method, **options)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 3
    assert llm.engine.parts.kv.transfers.converts
    if method == "speculative":
        assert llm.engine.runner._graphs._captured
        verified, _ = tokens("cuda", method, enforce_eager=True, verify_loads=True, **options)
        assert sum(a == b for a, b in zip(verified, expected, strict=True)) >= 3


@pytest.mark.parametrize("method", ["speculative", "oracle"])
def test_eager_steps_with_every_load_verified(method: str, tokens: Any, expected_of: Any) -> None:
    expected = expected_of(method)
    assert tokens("cuda", method, offload_layers=-1, enforce_eager=True, verify_loads=True)[0] == expected


@pytest.mark.parametrize("megabytes", [6, 12])
@pytest.mark.parametrize("method", ["speculative", "full"])
def test_layers_move_under_captured_steps(
    method: str, megabytes: int, tokens: Any, expected_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_of(method)
    monkeypatch.setattr(build, "device_memory", lambda *_: megabytes * 1_000_000)
    found, llm = tokens("cuda", method, offload_layers=None)
    assert found == expected
    assert llm.engine.parts.residency.moves


def test_memory_is_what_was_planned() -> None:
    gc.collect()  # tracebacks of tests that expect errors hold engines, in cycles with themselves
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated()
    assert others < 256 << 20, "engines of other tests are still there"
    llm = LLM("nano", device="cuda", gpu_memory=1 << 30, enforce_eager=True)
    llm.generate([[7] * 9000], SamplingParams(temperature=0, max_tokens=20))
    assert torch.cuda.max_memory_allocated() - others <= 1 << 30


@pytest.mark.parametrize("close", [False, True], ids=["dropped", "closed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_that_come_and_go_leave_nothing(dtype: str, close: bool) -> None:
    """Captured steps in number formats with and without compiled layers; the collector does not run by itself."""

    def live(ends: bool) -> None:
        config = SpeContextConfig(budget=256, offload_layers=None if ends else 0)
        llm = LLM("nano", config=config, device="cuda", gpu_memory=1 << 30, max_model_len=8192, dtype=dtype)
        llm.generate([[7] * 3000, [8] * 500], SamplingParams(temperature=0, max_tokens=20))
        assert llm.engine.runner._graphs._captured
        if close:
            llm.engine.close()

    gc.collect()
    gc.disable()
    try:
        live(True)  # what libraries keep for good
        before = torch.cuda.memory_allocated()
        for number in range(4):
            live(bool(number % 2))
            assert torch.cuda.memory_allocated() <= before + (1 << 20)
    finally:
        gc.enable()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (64 << 20)


@pytest.mark.parametrize(
    ("method", "offload_layers", "kilobytes"), [("speculative", 0, 3000), ("speculative", 2, 2400), ("full", 0, 3000)]
)
def test_requests_that_wait_on_the_host_go_on_as_on_the_cpu(
    method: str,
    offload_layers: int,
    kilobytes: int,
    tokens: Any,
    expected_of: Any,
    programs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = expected_of(method, ask=programs)
    monkeypatch.setattr(build, "device_memory", lambda *_: kilobytes * 1000)
    found, llm = tokens("cuda", method, offload_layers=offload_layers, ask=programs)
    assert found == expected
    assert llm.engine.scheduler.preemptions


def test_steps_of_every_size_are_captured_before_they_are_needed(tokens: Any, loaded: dict[str, LoadedModel]) -> None:
    llm = LLM(loaded["cuda"], config=SpeContextConfig(budget=256), max_model_len=4096, max_num_seqs=5)
    llm.engine.check_integrity()
    captured = dict(llm.engine.runner._graphs._captured)
    assert {(kind.size, kind.span) for kind in captured} == {(size, span) for size in (1, 2, 4, 5) for span in (256, 4096)}
    ask = [[7 + i] * 300 for i in range(5)]
    found = [output.token_ids for output in llm.generate(ask, SamplingParams(temperature=0, max_tokens=20))]
    assert llm.engine.runner._graphs._captured == captured
    cpu = LLM(loaded["cpu"], config=SpeContextConfig(budget=256), max_model_len=4096, max_num_seqs=5)
    assert found == [output.token_ids for output in cpu.generate(ask, SamplingParams(temperature=0, max_tokens=20))]


@pytest.mark.parametrize("method", ["streaming", "full", "oracle", "quest", "shadowkv", "h2o", "clusterkv", "snapkv"])
def test_methods_that_requests_name_are_captured_once_they_recur(method: str, loaded: dict[str, LoadedModel]) -> None:
    ask, greedy = (
        [[7 + i] * 700 + [*range(20, 320)] for i in range(3)],
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    )
    found = {}
    for device, options in (("cpu", {}), ("cuda", {"enforce_eager": True}), ("cuda graphs", {})):
        config = SpeContextConfig(budget=128, offload_layers=0)
        llm = LLM(loaded[device[:4].strip()], config=config, methods=("speculative", method), max_model_len=2048, **options)
        outputs = llm.generate(ask, [replace(greedy, method=method)] * 3)
        found[device] = [output.token_ids for output in outputs]
        llm.engine.check_integrity()
    assert found["cuda"] == found["cuda graphs"] == found["cpu"]
    steps = outputs[0].stats["captured_steps"]
    assert steps == 0 if method in ("clusterkv", "snapkv") else steps > 12


@pytest.mark.parametrize("offload_layers", [0, -1])
def test_mixed_steps_run_captured_decode_tokens_beside_chunks(offload_layers: int, loaded: dict[str, LoadedModel]) -> None:
    """Requests that come one after the other: each one's chunks are computed beside the decode tokens of those before."""
    ask = [[7 + i] * 300 + [*range(20, 320)] for i in range(3)]
    params = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, prompt_logprobs=1 if i == 1 else None) for i in range(3)
    ]
    found = {}
    for device, options in (("cpu", {}), ("cuda", {"enforce_eager": True}), ("cuda graphs", {})):
        config = SpeContextConfig(budget=128, offload_layers=offload_layers)
        llm = LLM(
            loaded[device[:4].strip()], config=config, max_model_len=2048, max_num_batched_tokens=128, max_num_seqs=4, **options
        )
        generations = []
        for i, (prompt, one) in enumerate(zip(ask, params, strict=True)):
            generations.append(llm.engine.add_request(str(i), prompt, one))
            for _ in range(8):
                llm.engine.step()
        while llm.engine.has_work:
            llm.engine.step()
        llm.engine.check_integrity()
        found[device] = [one.request.output_token_ids for one in generations]
        if options == {} and device != "cpu":
            for one in generations:
                assert one.stats is not None
                assert one.stats.captured_steps == one.stats.decode_steps == 39
    assert found["cuda"] == found["cuda graphs"] == found["cpu"]


def test_requests_that_choose_differently_are_captured_side_by_side(loaded: dict[str, LoadedModel]) -> None:
    ask = [[7 + i] * 400 + [*range(20, 320)] for i in range(3)]
    found = {}
    for device in ("cpu", "cuda"):
        llm = LLM(loaded[device], config=SpeContextConfig(budget=128, offload_layers=0), max_model_len=2048)
        params = [
            SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, method=method) for method in (None, "full", "streaming")
        ]
        outputs = llm.generate(ask, params)
        found[device] = [output.token_ids for output in outputs]
        steps = [output.stats["captured_steps"] for output in outputs]
    assert found["cuda"] == found["cpu"]
    assert steps[0] == 39 and min(steps[1:]) > 20


@pytest.mark.parametrize("offload_layers", [0, -1])
def test_steps_that_are_launched_ahead_change_nothing(offload_layers: int, loaded: dict[str, LoadedModel]) -> None:
    """Greedy and sampled requests of different lengths, some of which end by a token that the host sees a step later."""
    ask = [[7 + i] * 300 + [*range(20, 320)] for i in range(4)]
    config = SpeContextConfig(budget=128, offload_layers=offload_layers)
    params = [SamplingParams(temperature=0, max_tokens=60 - 9 * i, ignore_eos=True) for i in range(2)]
    params += [SamplingParams(temperature=1, top_p=0.9, seed=i, max_tokens=50, ignore_eos=True) for i in range(2)]
    found = []
    for ahead in (False, True):
        llm = LLM(loaded["cuda"], config=config, max_model_len=2048)
        assert llm.engine.runs_ahead
        llm.engine.runs_ahead = ahead
        free = llm.generate(ask, params)
        ends = [replace(one, stop_token_ids=[free[i].token_ids[20 + i]]) for i, one in enumerate(params)]
        found.append([*free, *llm.generate(ask, ends)])
        llm.engine.check_integrity()
        assert llm.engine._ahead is None
    for one, other in zip(*found, strict=True):
        assert (other.token_ids, other.text, other.finish_reason) == (one.token_ids, one.text, one.finish_reason)
        for name in ("decode_steps", "captured_steps", "tokens_read_per_step", "bytes_loaded_per_step", "overlap", "hit_rate"):
            assert other.stats[name] == one.stats[name], name


@pytest.mark.parametrize("offload_layers", [0, -1])
def test_steps_ahead_of_what_the_host_has_a_part_in_change_nothing(offload_layers: int, loaded: dict[str, LoadedModel]) -> None:
    """Grammars of which some end by themselves, penalties and log-probabilities, beside a free request; on a CPU the same."""
    ask = [[7 + i] * 300 + [*range(20, 320)] for i in range(4)]
    config = SpeContextConfig(budget=128, offload_layers=offload_layers)
    common: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "logprobs": 2}
    params = [
        SamplingParams(temperature=0, structured_outputs={"regex": "[a-z ]{600}"}, **common),
        SamplingParams(temperature=1, seed=3, structured_outputs={"regex": "[0-9]{9} [a-z]{9}"}, **common),
        SamplingParams(temperature=1, seed=4, repetition_penalty=1.2, bad_words=["the"], min_tokens=20, **common),
        SamplingParams(temperature=1, top_p=0.9, seed=5, max_tokens=40, ignore_eos=True),
    ]
    found = []
    for device, ahead in (("cpu", False), ("cuda", False), ("cuda", True)):
        llm = LLM(loaded[device], config=config, max_model_len=2048)
        assert llm.engine.runs_ahead == (device == "cuda")
        llm.engine.runs_ahead = ahead
        found.append(llm.generate(ask, params))
        llm.engine.check_integrity()
        assert llm.engine._ahead is None
    for cpu, one, other in zip(*found, strict=True):
        assert other.token_ids == one.token_ids == cpu.token_ids and other.finish_reason == one.finish_reason
        assert other.stats["captured_steps"] == one.stats["captured_steps"]
        for before, after in zip(one.outputs[0].logprobs or (), other.outputs[0].logprobs or (), strict=True):
            assert after == pytest.approx(before, abs=1e-3)


def test_clients_that_name_many_budgets_fill_no_memory_with_graphs(loaded: dict[str, LoadedModel]) -> None:
    llm = LLM(loaded["cuda"], config=SpeContextConfig(budget=128), max_model_len=2048)
    for budget in range(40, 80):
        llm.generate([9] * 300, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, budget=budget))
    named = [kind for kind in llm.engine.runner._graphs._captured if kind.choice is not None]
    assert len(named) <= NAMED


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """Call it, and the device has no memory left beyond what PyTorch has reserved and some bytes."""

    def begin(room: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)

    yield begin
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("graphs", [False, True], ids=["prompt", "capture"])
def test_a_step_without_memory_ends_its_requests_and_no_others(
    graphs: bool, loaded: dict[str, LoadedModel], little_memory: Callable[[int], None]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = LLM(loaded["cpu"], config=SpeContextConfig(budget=256)).generate([[9] * 400], params)[0].token_ids
    llm = LLM(
        loaded["cuda"],
        config=SpeContextConfig(budget=256, offload_layers=0),
        max_num_batched_tokens=16000,
        enforce_eager=not graphs,
        max_num_seqs=2,
    )
    engine = llm.engine
    engine.add_request("big", [7] * (400 if graphs else 16000), params)
    if graphs:
        engine.runner._graphs.close()  # as if none had been captured yet
        engine.runs_ahead = False  # the next step would be captured within this one
        engine.step()  # the prompt
    little_memory(0 if graphs else 16 << 20)  # a chunk of 16,000 tokens takes more
    with pytest.raises(DeviceMemoryError, match="ran out of memory") as caught:
        for _ in range(3):
            engine.step()
    assert caught.value.request_ids == ("big",)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert not engine.has_work
    engine.check_integrity()
    assert llm.generate([[9] * 400], params)[0].token_ids == expected


def test_memory_that_ends_inside_a_capture_ends_the_requests_of_the_step(
    loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = LLM(loaded["cpu"], config=SpeContextConfig(budget=256)).generate([[9] * 400], params)[0].token_ids
    llm = LLM(loaded["cuda"], config=SpeContextConfig(budget=256, offload_layers=0), max_num_seqs=2)
    runner = llm.engine.runner
    runner._graphs.close()  # as if none had been captured yet
    llm.engine.runs_ahead = False  # the first step would be captured within that of the prompt
    run = runner._fused

    def fails(batch: Batch) -> Tensor:
        logits = run(batch)
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits

    llm.engine.add_request("big", [9] * 400, params)
    llm.engine.step()
    monkeypatch.setattr(runner, "_fused", fails)
    with pytest.raises(DeviceMemoryError, match="ran out of memory"):
        llm.engine.step()
    monkeypatch.setattr(runner, "_fused", run)
    llm.engine.check_integrity()
    assert llm.generate([[9] * 400], params)[0].token_ids == expected


FAILING = """
import torch
from specontext import LLM, SamplingParams, SpeContextConfig
llm = LLM("nano", device="cuda", config=SpeContextConfig(budget=256, offload_layers=0), max_num_seqs=2, enforce_eager={eager})
stream = llm.stream([9] * 400, SamplingParams(max_tokens=20, ignore_eos=True))
for _ in range(3):
    next(stream)
llm.engine.parts.kv.transfers.tiers.tokens.table.fill_(1 << 40)  # kernels read where nothing is
try:
    list(stream)
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "captured"])
def test_a_gpu_that_fails_ends_the_engine_with_words(eager: bool) -> None:
    ended = subprocess.run([sys.executable, "-c", FAILING.format(eager=eager)], capture_output=True, text=True, timeout=300)
    assert ended.stdout.startswith("DeviceError: the GPU has failed"), ended.stdout + ended.stderr[-2000:]
