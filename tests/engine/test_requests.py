"""Requests that cannot be served are refused with the reason, and nothing of them stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specontext import LLM, ConfigError, SamplingParams
from specontext.core import RequestError
from specontext.engine.runner import DeviceMemoryError

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
    small = make_llm("llama", "streaming", budget=20, offload_layers=offload_layers, **{tier: memory_for(llm, 8)}, max_num_seqs=1)
    if tier == "gpu_memory":
        with pytest.raises(RequestError, match=f"raise {tier}, or lower max_tokens"):
            small.generate([[5] * 100])
    else:
        with pytest.raises(RequestError, match=f"raise {tier}"):
            small.generate([[5] * 140])
    assert small.generate([[5] * 10])[0].token_ids


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
