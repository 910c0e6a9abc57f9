"""Log-probabilities of prompts are Hugging Face's, whatever the chunks, company, tiers and interruptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.engine.generation import Generation
from specontext.engine.scheduler import Schedule
from specontext.errors import RequestError
from tests.conftest import FAMILIES, MakeLLM, Prompts, family_config, write_checkpoint

TOP = 3
Table = list[dict[int, float] | None]
Judge = Callable[..., None]
Greedy = Callable[..., SamplingParams]


@pytest.fixture(scope="module")
def judge(reference: Callable[[str], PreTrainedModel]) -> Judge:
    """judge(family, prompt, found, top): raises unless `found` is what the reference model says about the prompt."""

    def check(family: str, prompt: list[int], found: Table | None, top: int = TOP) -> None:
        with torch.no_grad():
            agree(reference(family)(torch.tensor([prompt])).logits[0], prompt, found, top)

    return check


def agree(logits: torch.Tensor, prompt: list[int], found: Table | None, top: int) -> None:
    """Raises unless `found` is what logits [S, V] say about the prompt."""
    expected = logits.float().log_softmax(dim=1)
    assert found is not None and len(found) == len(prompt) and found[0] is None
    for row, token, table in zip(expected, prompt[1:], found[1:], strict=False):
        assert table is not None and token in table and len(table) in (top, top + 1)
        assert list(table.values()) == pytest.approx([row[t].item() for t in table], abs=1e-4)
        likeliest = list(table.values())[:top]
        assert likeliest == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)


def chunks_of(llm: LLM) -> list[tuple[str, int, int]]:
    """From now on, every chunk (request, start, length) that the engine computes."""
    seen: list[tuple[str, int, int]] = []
    advance = llm.engine.scheduler.advance

    def noting(schedule: Schedule) -> Any:
        prefills = schedule.batch.prefills
        requests = schedule.requests[schedule.batch.num_decodes :]
        seen.extend((r.request_id, s.start, s.length) for r, s in zip(requests, prefills, strict=True))
        return advance(schedule)

    llm.engine.scheduler.advance = noting  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_family_and_chunk(
    family: str, chunk: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, judge: Judge
) -> None:
    llm = make_llm(family, budget=12, offload_layers=2, max_num_batched_tokens=chunk)
    for prompt, output in zip(prompts, llm.generate(prompts, greedy(3, prompt_logprobs=TOP)), strict=True):
        judge(family, prompt, output.prompt_logprobs)


@pytest.mark.parametrize("method", ["full", "speculative", "oracle"])
@pytest.mark.parametrize("offload_layers", [0, 1, -1])
def test_company_and_tiers(
    method: str, offload_layers: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, judge: Judge
) -> None:
    llm = make_llm("qwen3", method, budget=12, offload_layers=offload_layers, max_num_batched_tokens=23)
    asked = [0, None, TOP, 1]
    plain = llm.generate(prompts, greedy())
    outputs = llm.generate(prompts, [greedy(prompt_logprobs=top, logprobs=top) for top in asked])
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert all(output.prompt_logprobs is None for output in [*plain, outputs[1]])
    for prompt, output, top in zip(prompts, outputs, asked, strict=True):
        if top is not None:
            judge("qwen3", prompt, output.prompt_logprobs, top)


def test_slices_change_nothing(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm("llama", max_num_batched_tokens=64)
    rows: list[int] = []
    logits_of = llm.engine.runner.logits_of
    monkeypatch.setattr("specontext.kernels.token_choice._CHUNK", 5 * llm.shape.vocab_size)
    monkeypatch.setattr(llm.engine.runner, "logits_of", lambda states: rows.append(len(states)) or logits_of(states))
    outputs = llm.generate(prompts, greedy(1, prompt_logprobs=TOP))
    assert max(rows) == 5 and sum(rows) == sum(len(prompt) - 1 for prompt in prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        judge("llama", prompt, output.prompt_logprobs)


def test_decode_steps_and_other_requests_go_the_usual_way(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm("llama")
    calls: list[int] = []
    with_states = llm.engine.runner.run_with_states
    monkeypatch.setattr(
        llm.engine.runner, "run_with_states", lambda batch, rows: calls.append(len(rows)) or with_states(batch, rows)
    )
    llm.generate(prompts, greedy(6))
    assert calls == []
    llm.generate(prompts, [greedy(6), greedy(6, prompt_logprobs=0), greedy(6), greedy(6)])
    assert calls == [len(prompts[1]) - 1]


def test_a_prompt_of_one_token_and_more_than_the_vocabulary(make_llm: MakeLLM, greedy: Greedy) -> None:
    llm = make_llm("llama")
    one, two = llm.generate([[5], [5, 6]], greedy(1, prompt_logprobs=10**6))
    assert one.prompt_logprobs == [None]
    assert two.prompt_logprobs is not None and two.prompt_logprobs[1] is not None
    assert len(two.prompt_logprobs[1]) == llm.shape.vocab_size


def test_outputs_of_one_prompt_and_streams(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, judge: Judge) -> None:
    llm = make_llm("llama", max_num_batched_tokens=32)
    (output,) = llm.generate([prompts[1]], greedy(4, n=3, prompt_logprobs=TOP))
    judge("llama", prompts[1], output.prompt_logprobs)
    for part in llm.stream(prompts[2], greedy(4, prompt_logprobs=TOP)):
        judge("llama", prompts[2], part.prompt_logprobs)


def test_a_model_that_scales_its_logits(tmp_path: Path, tokenizer: Any, prompts: Prompts, greedy: Greedy) -> None:
    """What a model does to its logits after the output layer is done for prompts too."""
    config = family_config("llama", len(tokenizer))
    shape = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    scaled = GraniteConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, logits_scaling=3.0, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    folder = write_checkpoint(tmp_path, scaled, None, tokenizer)
    llm = LLM(folder, None, SpeContextConfig(method="full"), device="cpu", max_num_batched_tokens=32)
    (output,) = llm.generate([prompts[1]], greedy(1, prompt_logprobs=TOP))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        agree(model(torch.tensor([prompts[1]])).logits[0], prompts[1], output.prompt_logprobs, TOP)


# Interruptions --------------------------------------------------------------------------------------------------------


def interrupted(llm: LLM, prompts: Prompts, params: SamplingParams, *, after: int, restart: bool) -> list[Generation]:
    """Run all prompts; the second one loses its seat after some steps, and what it has computed if it is to restart."""
    engine = llm.engine
    generations = [engine.add_request(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]
    for _ in range(after):
        engine.step()
    victim = generations[1].request
    assert victim.seat >= 0 and victim.computed > 0
    computed = victim.computed
    engine.scheduler.admission.put_back(victim)
    if restart:
        assert engine.scheduler.admission.drop_parked(but=None)
    assert victim.computed == (0 if restart else computed)
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    return generations


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("after", [2, 4, 9, 16])  # amid the second prompt, and amid its output
def test_waiting_amid_a_prompt_or_an_output(
    after: int, restart: bool, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, judge: Judge
) -> None:
    llm = make_llm("llama", budget=110, offload_layers=2, max_num_batched_tokens=9)
    for prompt, generation in zip(
        prompts, interrupted(llm, prompts, greedy(prompt_logprobs=TOP), after=after, restart=restart), strict=True
    ):
        judge("llama", prompt, generation.request.prompt_logprobs)


@pytest.mark.parametrize(("host_pages", "again"), [(34, False), (22, True)])
def test_little_memory(host_pages: int, again: bool, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, judge: Judge) -> None:
    """The host has room for the KV of those that wait, or it has none and they are computed again."""
    page = 16 * make_llm("llama").shape.kv_bytes_per_token  # of all layers, which lie side by side on the host
    options = {"offload_layers": 1, "gpu_memory": 44 * page // 3, "host_memory": host_pages * page, "max_num_batched_tokens": 20}
    llm = make_llm("llama", "full", **options)
    chunks = chunks_of(llm)
    three = [prompts[0], prompts[3], prompts[1]]
    outputs = llm.generate(three, [greedy(n, prompt_logprobs=TOP) for n in (140, 150, 120)])
    assert llm.engine.scheduler.preemptions > 0
    assert (sum(length for _, _, length in chunks) > sum(map(len, three))) == again
    for prompt, output in zip(three, outputs, strict=True):
        judge("llama", prompt, output.prompt_logprobs)


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_bad_values_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=value)
