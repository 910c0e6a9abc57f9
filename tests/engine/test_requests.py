"""Requests that cannot be served are refused with the reason, and nothing of them stays behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specontext import LLM, ConfigError, SamplingParams, SpeContextConfig
from specontext.errors import DeviceMemoryError, MemoryPlanError, RequestError
from specontext.kv.seats import ParkedKV
from specontext.models.token_ids import unknown_token

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm("llama", budget=20, max_model_len=64)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ([], "no prompt was given"),
        ([5] * 64, "the prompt has 64 tokens and the model's maximum is 64"),
        ([5, -1], "-1 is not a token id"),
        ([5, 10**6], "1000000 is not a token id of this model: its vocabulary is 0 .."),
        ([[5, 1.5]], "1.5 is not a token id"),
        ([[5, True]], "True is not a token id"),
    ],
)
def test_prompts_that_cannot_be_served(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt)
    with pytest.raises(RequestError):
        llm.stream(prompt)
    assert not llm.engine.has_work


def test_one_bad_prompt_stops_the_whole_call_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate([[5, 6], [7] * 64], SamplingParams(n=2))
    assert not llm.engine.has_work and llm.engine.parts.kv.arena.pages.num_held == 0


def test_a_bad_prompt_among_others_is_named_and_nothing_of_them_is_left(llm: LLM) -> None:
    """Not even a random number: sampled requests that name no seed draw one."""
    before = llm.engine.intake.seeds.getstate()
    for bad, why in (
        ([5, 10**6], "not a token id"),
        ([], "empty"),
        ([7] * 64, "64 tokens"),
        (None, "a text or a list"),
        ("", "empty"),
    ):
        prompts: Any = [[5, 6], "Find", bad, [7]]
        with pytest.raises(RequestError, match=f"^prompt 2 of 4, counted from 0: .*{why}"):
            llm.generate(prompts, SamplingParams(n=2))
    with pytest.raises(RequestError, match=r"^prompt 1 of 2, counted from 0: stop_token_ids: 1000000 is not"):
        llm.generate([[5], [6]], [SamplingParams(), SamplingParams(stop_token_ids=[10**6])])
    assert not llm.engine.has_work and llm.engine.parts.kv.arena.pages.num_held == 0
    assert llm.engine.intake.seeds.getstate() == before


@pytest.mark.parametrize("given", [5, None, {5}, iter([5]), [5, "text"], b"text"])
def test_what_is_no_prompt_is_refused(given: Any, llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(given)
    assert not llm.engine.has_work


def test_what_is_no_text_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="not Unicode: half a character at 1"):
        llm.generate("a\ud800")
    with pytest.raises(RequestError, match="stream takes one prompt, got 2"):
        llm.stream([[5], [6]])  # type: ignore[list-item]
    wrong: Any = "greedy"
    with pytest.raises(RequestError, match="params must be SamplingParams"):
        llm.generate([5], wrong)


@pytest.mark.parametrize("token", [-1, 10**6, 10**30, 1 << 20000], ids=["negative", "large", "larger", "huge"])
def test_tokens_that_end_an_output_must_be_the_model_s(token: int, llm: LLM) -> None:
    with pytest.raises(RequestError, match="stop_token_ids"):
        llm.generate([5], SamplingParams(stop_token_ids=[7, token]))
    assert llm.generate([5], SamplingParams(stop_token_ids=[llm.shape.vocab_size - 1], max_tokens=2))[0].token_ids


# A tokenizer that knows more than its model ---------------------------------------------------------------------------


def test_a_token_without_a_row_is_named_wherever_it_comes_from(larger_tokenizer: Path) -> None:
    llm = LLM(larger_tokenizer, device="cpu", max_model_len=64)
    rows, greedy = llm.shape.vocab_size, SamplingParams(temperature=0, max_tokens=2)
    expected = llm.generate("apple = 417.", greedy)[0].token_ids
    named = rf"token {rows} \('<\|new\|>'\) is in the tokenizer and not in the model, whose embedding has the {rows} rows"
    for prompt in ("apple <|new|>", [5, rows]):
        with pytest.raises(RequestError, match="^" + named):
            llm.generate(prompt, greedy)
        with pytest.raises(RequestError, match="^prompt 1 of 2, counted from 0: " + named):
            llm.generate(["apple = 417.", prompt], greedy)  # type: ignore[list-item]
        with pytest.raises(RequestError, match="^" + named):
            llm.stream(prompt, greedy)
        with pytest.raises(RequestError, match="^" + named):
            llm.engine.add_request("forced", [5], greedy, forced=llm.tokenizer("<|new|>")["input_ids"])
    with pytest.raises(RequestError, match="^stop_token_ids: " + named):
        llm.generate([5], SamplingParams(stop_token_ids=[rows]))
    with pytest.raises(RequestError, match=f"^{rows + 1} is not a token id of this model: its vocabulary is 0 .. {rows - 1}"):
        llm.generate([5, rows + 1])
    assert not llm.engine.has_work
    assert llm.generate("apple = 417.", greedy)[0].token_ids == expected


def test_what_a_tokenizer_says_of_ids_that_it_lacks_is_not_believed() -> None:
    class Unknown:
        """As older tokenizers do, it answers '<unk>' for whatever it does not know."""

        def convert_ids_to_tokens(self, token: int) -> str:
            return "<unk>"

        def convert_tokens_to_ids(self, text: str) -> int:
            return 0

    assert unknown_token([9], 5, Unknown()) == "9 is not a token id of this model: its vocabulary is 0 .. 4"
    assert unknown_token(range(5), 5, Unknown()) is None and unknown_token([], 5, Unknown()) is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(-2, 9) | st.booleans() | st.floats() | st.integers() | st.none(), max_size=8))
def test_ids_are_known_or_refused(ids: list[Any]) -> None:
    class Silent:
        def convert_ids_to_tokens(self, token: int) -> None: ...

    assert (unknown_token(ids, 8, Silent()) is None) == all(type(token) is int and 0 <= token < 8 for token in ids)


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="3 sampling parameters were given for 2 prompts"):
        llm.generate([[5], [6]], [SamplingParams()] * 3)


def test_a_request_id_is_used_once_at_a_time(llm: LLM) -> None:
    llm.engine.add_request("same", [5], SamplingParams())
    with pytest.raises(RequestError, match="request id 'same' is in use"):
        llm.engine.add_request("same", [6], SamplingParams())
    llm.engine.abort("same")
    assert not llm.engine.has_work


def test_text_prompts_are_the_tokenizer_s_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    (text,) = llm.generate("Find the word.", params)
    (ids,) = llm.generate(llm.tokenizer("Find the word.")["input_ids"], params)
    assert (text.prompt_token_ids, text.token_ids) == (ids.prompt_token_ids, ids.token_ids)


def memory_for(llm: LLM, pages: int) -> int:
    return pages * 16 * llm.shape.row_bytes * llm.shape.kv_heads


@pytest.mark.parametrize("tier", ["gpu_memory", "host_memory"])
def test_a_request_that_could_never_run_is_refused(tier: str, llm: LLM, make_llm: MakeLLM) -> None:
    offload_layers = 0 if tier == "gpu_memory" else 1
    memory = {tier: memory_for(llm, 8 if tier == "gpu_memory" else 8 * llm.shape.layers)}  # on the host layers lie side by side
    small = make_llm("llama", "streaming", budget=20, offload_layers=offload_layers, **memory, max_num_seqs=1)
    with pytest.raises(RequestError, match=f"raise {tier} by that"):
        small.generate([[5] * (100 if tier == "gpu_memory" else 140)])
    assert small.generate([[5] * 10])[0].token_ids


@pytest.mark.parametrize("method", ["full", "streaming", "speculative"])
@pytest.mark.parametrize("offload_layers", [0, 2, -1, None])
@pytest.mark.parametrize(("device", "host"), [(20, 6), (4, 200), (500, 6), (6, 12)])
def test_the_tier_that_is_short_is_named_and_what_it_lacks_is_enough(
    method: str, offload_layers: int | None, device: int, host: int, llm: LLM, make_llm: MakeLLM
) -> None:
    options: dict[str, Any] = {"budget": 20, "sink": 2, "recent": 2, "offload_layers": offload_layers, "max_num_seqs": 1}
    memory = {"gpu_memory": memory_for(llm, device), "host_memory": memory_for(llm, host)}
    try:
        small = make_llm("llama", method, **options, **memory)
        small.engine.add_request("long", [5] * 400, SamplingParams(max_tokens=20))
    except MemoryPlanError:
        return  # not even one page of KV: tests/memory/test_tiers.py
    except RequestError as error:
        lacks = re.findall(r"(\d+) bytes more than the (\d+) of the (device|host) tier", str(error))
        settings = re.search(r"raise (gpu_memory|host_memory)(?: (and|or) (host_memory))? by that", str(error))
        assert settings is not None and len(lacks) == (2 if settings[2] else 1)
        named = {"gpu_memory" if tier == "device" else "host_memory": int(more) for more, _, tier in lacks}
        assert {name for name in settings.groups() if name and name.endswith("memory")} == set(named)
        for helps in [named] if settings[2] == "and" else [{name: more} for name, more in named.items()]:
            more = memory | {name: small.engine.parts.kv.arena.num_bytes + more for name, more in helps.items() if name[0] == "g"}
            more |= {name: small.engine.parts.kv.host.num_bytes + more for name, more in helps.items() if name[0] == "h"}
            make_llm("llama", method, **options, **more).engine.add_request("long", [5] * 400, SamplingParams(max_tokens=20))


def test_a_host_tier_too_small_is_not_blamed_on_the_device() -> None:
    config = SpeContextConfig(method="full", offload_layers=-1)
    small = LLM("nano", None, config, device="cpu", max_num_seqs=1, host_memory=1 << 20, gpu_memory=1 << 33)
    with pytest.raises(RequestError, match=r"more than the 1048576 of the host tier of KV: raise host_memory by that") as error:
        small.generate([[5] * 6000], SamplingParams(max_tokens=7))
    assert "gpu_memory" not in str(error.value)


def test_memory_that_others_hold_for_now_is_no_reason_to_refuse(make_llm: MakeLLM) -> None:
    """Requests that wait keep their KV on the host; whoever comes then waits too."""
    small = make_llm("llama", "streaming", budget=20, gpu_memory=1 << 16, host_memory=1 << 18, offload_layers=None)
    longest = next(n for n in range(500, 0, -1) if small.engine.parts.residency.lack(n) is None)
    kv = small.engine.parts.kv
    kv.parked.append(ParkedKV(0, [kv.host.allocate(kv.host.pages.num_free)], kv.reader))
    assert small.engine.parts.residency.lack(longest) is None and not small.engine.parts.residency.fits_somehow([longest])


@pytest.mark.parametrize("offload_layers", [-1, 1, None])
def test_a_request_whose_head_keys_could_never_fit_is_refused(offload_layers: int | None, make_llm: MakeLLM) -> None:
    """The head's keys are on the device too; waiting for room that never comes would hang."""
    options: dict[str, Any] = {"budget": 20, "offload_layers": offload_layers, "max_num_seqs": 6}
    memory = make_llm("llama", **options | {"offload_layers": -1}, max_model_len=32).engine.parts.sizes.device_bytes // 3
    engine = make_llm("llama", **options, gpu_memory=memory, host_memory=1 << 24)
    params = SamplingParams(max_tokens=4, ignore_eos=True)

    def accepted(length: int) -> bool:
        try:
            engine.engine.add_request("probe", [5] * length, params)
        except RequestError as error:
            assert "gpu_memory" in str(error)
            return False
        engine.engine.abort("probe")
        return True

    longest = max(length for length in range(1, 509) if accepted(length))
    assert 16 < longest < 400 and not any(accepted(length) for length in (longest + 1, longest + 16, 508))
    assert len(engine.generate([[5] * longest], params)[0].token_ids) == 4
    assert not engine.engine.has_work


def test_a_context_beyond_the_model_s_is_refused(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match="max_model_len 513 exceeds the model's maximum of 512 tokens"):
        make_llm("llama", max_model_len=513)


def test_more_offloaded_layers_than_the_model_has(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match="offload_layers 4 exceeds the model's 3 layers"):
        make_llm("llama", offload_layers=4)


def test_a_budget_that_no_memory_holds_is_named(make_llm: MakeLLM) -> None:
    with pytest.raises(MemoryPlanError, match="set max_model_len, max_num_seqs or the budget lower"):
        make_llm("llama", budget=10**12)


def test_options_that_do_not_exist_and_devices_that_are_not_there(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match="unknown option page_sise"):
        make_llm("llama", page_sise=3)
    for device, message in (("tpu9", "unknown device 'tpu9'"), ("meta", "not supported"), ("cuda:99", "is not there")):
        with pytest.raises(ConfigError, match=message):
            make_llm("llama", device=device)


def test_the_configuration_cannot_change_under_a_running_stream(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
    next(stream)
    with pytest.raises(ConfigError, match="running streams"):
        llm.reconfigure(llm.config)
    assert len([*stream][-1].token_ids) == 8
    llm.reconfigure(llm.config)


def test_a_configuration_that_does_not_fit_leaves_the_engine_as_it_was(llm: LLM, make_llm: MakeLLM) -> None:
    before = llm.generate([[5, 6, 7]], SamplingParams(temperature=0))[0].token_ids
    with pytest.raises(ConfigError):
        llm.reconfigure(type(llm.config)(offload_layers=9))
    assert llm.generate([[5, 6, 7]], SamplingParams(temperature=0))[0].token_ids == before


def test_a_step_that_does_not_fit_ends_its_requests_and_no_others(
    make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., SamplingParams], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm("llama", max_num_seqs=1)
    engine = llm.engine
    engine.add_request("first", prompts[0], greedy(4))
    second = engine.add_request("second", prompts[1], greedy(4))
    forward = engine.runner._forward

    def full(batch: object) -> object:
        monkeypatch.setattr(engine.runner, "_forward", forward)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")

    monkeypatch.setattr(engine.runner, "_forward", full)
    with pytest.raises(
        DeviceMemoryError, match=r"step of 5 tokens \(CUDA out of memory.*lower --max-num-batched-tokens"
    ) as caught:
        engine.step()
    assert caught.value.request_ids == ("first",)
    while engine.has_work:
        engine.step()
    assert len(second.request.output_token_ids) == 4
    engine.check_integrity()


def test_a_share_of_a_gpu_s_memory_means_nothing_on_a_cpu(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match="needs a GPU: on a CPU give gpu_memory"):
        make_llm("llama", gpu_memory_utilization=0.5)
