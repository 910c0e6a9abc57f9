"""Steps ahead of requests whose tokens the host has a part in: the forward pass is launched, and what it chooses waits for the
host, which meanwhile sees the token before. Outputs are those of one step after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.engine.failures import Failures
from specontext.engine.sampler import Drawn
from specontext.errors import ConstraintError, NamedRequestsError, NoTokenLeftError
from specontext.sampling_params import Thinking
from tests.engine.test_ahead import PAGE, Change, Greedy, MakeLLM, Prompts, ahead, same
from tests.engine.test_sampler import mixed_requests, random_logits
from tests.server.speaking import save_speaking

REGEX = {"regex": "[a-z ]{1,40}"}
DIGITS = {"regex": "[0-9]{3} ([a-z]+ ){2}x"}  # ends by itself
WAYS: list[dict[str, Any]] = [
    {"logprobs": 1},
    {"repetition_penalty": 1.2},
    {"frequency_penalty": 0.5},
    {"min_tokens": 4},
    {"bad_words": ["x"]},
    {"logit_bias": {7: 1.0}},
    {"allowed_token_ids": [*range(4, 90)]},
    {"structured_outputs": REGEX},
    {"prompt_logprobs": 1},
]
MIXED: list[dict[str, Any]] = [
    {"structured_outputs": DIGITS, "temperature": 1.0, "seed": 3, "logprobs": 2},
    {"temperature": 0.9, "top_p": 0.9, "seed": 4},
    {"structured_outputs": REGEX, "temperature": 0.7, "seed": 5, "n": 2, "repetition_penalty": 1.3},
    {"structured_outputs": {"choice": ["yes", "no, never"]}, "ignore_eos": False},
]


def same_with_logprobs(expected: list[Any], found: list[Any]) -> None:
    """Numbers are rounded otherwise where one that has ended is a row of the next step."""
    same(expected, found)
    for one, other in zip(expected, found, strict=True):
        pairs = [(one.prompt_logprobs, other.prompt_logprobs)]
        for left, right in zip(one.outputs, other.outputs, strict=True):
            assert (right.token_ids, right.finish_reason) == (left.token_ids, left.finish_reason)
            pairs.append((left.logprobs, right.logprobs))
        for wanted, tables in pairs:
            for numbers, table in zip(wanted or [], tables or [], strict=True):
                assert (table is None) == (numbers is None) and (table is None or table == pytest.approx(numbers, abs=1e-4))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way)))
def test_neither_they_nor_their_mates_wait(way: dict[str, Any], make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    plain, hasty = (make_llm("llama", budget=14) for _ in range(2))
    launched = ahead(hasty)
    params = [greedy(10, **way), greedy(12)]
    same_with_logprobs(*(llm.generate(prompts[:2], params) for llm in (plain, hasty)))
    assert launched.count((2, 0)) >= 8 and (1, 0) in launched


@pytest.mark.parametrize(
    ("offload_layers", "captured"),
    [(0, False), (2, True), *(pytest.param(*both, marks=pytest.mark.slow) for both in ((0, True), (2, False)))],
)
def test_grammars_seeds_penalties_and_free_ones_in_one_batch(
    captured: bool, offload_layers: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, as_if_captured: Change
) -> None:
    """With prompts in chunks. Captured, the logits of a step are overwritten by the next one."""
    plain, hasty = (make_llm("llama", budget=14, offload_layers=offload_layers, max_num_batched_tokens=30) for _ in range(2))
    for llm in (plain, hasty):
        if captured:
            as_if_captured(llm)
    launched = ahead(hasty)
    params = [greedy(24, **way) for way in MIXED]
    expected, found = (llm.generate(prompts, params) for llm in (plain, hasty))
    same_with_logprobs(expected, found)
    assert {one.finish_reason for one in found} == {"length", "stop"}, "some end by their grammar"
    assert any(decodes > 2 for decodes, _ in launched) and any(decodes and chunks for decodes, chunks in launched)
    hasty.engine.check_integrity()
    assert hasty.engine._ahead is None and hasty.engine.parts.kv.arena.pages.num_held == 0
    again = [prompt + output.token_ids for prompt, output in zip(prompts, found, strict=True)]
    same_with_logprobs(plain.generate(again, params), hasty.generate(again, params))


def test_the_next_pass_is_launched_before_tokens_are_awaited(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm("llama", budget=14)
    ahead(llm)
    done: list[str] = []
    run, read = llm.engine.runner.run, Drawn.read
    monkeypatch.setattr(llm.engine.runner, "run", lambda batch: done.append("run") or run(batch))
    monkeypatch.setattr(Drawn, "read", lambda drawn, failures: done.append("read") or read(drawn, failures))
    llm.generate(prompts[:2], [greedy(8, structured_outputs=REGEX, logprobs=1), greedy(8)])
    assert done == ["run", *["run", "read"] * 7, "read"]


def test_nothing_waits_while_tokens_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before they are read: whoever waited would wait for the pass that was launched ahead."""
    requests, logits = mixed_requests(), random_logits(45, 300, scale=1.0)
    expected = [each.token for each in Drawn(logits, [*enumerate(requests)], (9,)).read(Failures())]
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("it waits for the device"))
        drawn = Drawn(logits, [*enumerate(requests)], (9,))
    assert [each.token for each in drawn.read(Failures())] == expected


@pytest.mark.parametrize("steps", range(1, 7))
def test_requests_that_are_aborted_while_a_step_is_under_way(
    steps: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy
) -> None:
    params = [greedy(14, temperature=1.0, seed=seed, structured_outputs=REGEX) for seed in range(3)]
    llm = make_llm("llama", budget=14)
    expected = [output.token_ids for output in llm.generate(prompts[:3], params)]
    launched, engine = ahead(llm), llm.engine
    made = [engine.add_request(str(i), prompts[i], params[i]) for i in range(3)]
    for _ in range(steps):
        engine.step()
    engine.abort("1")
    while engine.has_work:
        engine.step()
    assert [made[i].request.output_token_ids for i in (0, 2)] == [expected[i] for i in (0, 2)] and (2, 0) in launched
    engine.check_integrity()


@pytest.mark.slow
def test_requests_that_have_to_wait_in_between(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    params = [greedy(120 + 10 * i, temperature=1.0, seed=i, structured_outputs={"regex": "[a-z ]{600}"}) for i in range(3)]
    three = [prompts[0], prompts[3], prompts[1]]
    expected = [make_llm("llama", budget=12).generate(*each)[0].token_ids for each in zip(three, params, strict=True)]
    llm = make_llm("llama", budget=12, offload_layers=2, gpu_memory=34 * PAGE, host_memory=120 * PAGE, max_num_batched_tokens=40)
    launched = ahead(llm)
    assert [output.token_ids for output in llm.generate(three, params)] == expected
    assert llm.engine.scheduler.preemptions and len(launched) > 100
    llm.engine.check_integrity()


def test_a_grammar_that_cannot_go_on_fails_its_request_alone(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its mask, behind which nothing is left to choose, and where it takes a token."""
    llm = make_llm("llama", budget=14)
    expected = llm.generate(prompts[2], greedy(12))[0].token_ids
    ahead(llm)
    engine = llm.engine
    letter = llm.tokenizer("a", add_special_tokens=False)["input_ids"]
    stuck = greedy(12, structured_outputs={"regex": "aaa[0-9]+"}, allowed_token_ids=letter)
    for params, error in ((stuck, NoTokenLeftError), (greedy(12, structured_outputs=REGEX), ConstraintError)):
        good, bad = (engine.add_request(*each) for each in (("good", prompts[2], greedy(12)), ("bad", prompts[1], params)))
        while len(bad.request.output_token_ids) < 3:
            engine.step()
        if error is ConstraintError:
            assert bad.constraint is not None
            bad.constraint.matcher.consume_token(llm.tokenizer("7", add_special_tokens=False)["input_ids"][0])  # not allowed
        with pytest.raises(NamedRequestsError) as caught:
            while engine.has_work:
                engine.step()
        assert caught.value.request_ids == ("bad",) and isinstance(caught.value.reasons["bad"], error)
        while engine.has_work:
            engine.step()
        assert good.request.output_token_ids == expected and bad.request.finish_reason == "abort"
        engine.check_integrity()


@pytest.mark.parametrize("way", ["on_logits", "forced"])
def test_whoever_looks_at_logits_or_forces_tokens_is_waited_for(
    way: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy
) -> None:
    llm = make_llm("llama", budget=14)
    launched, seen = ahead(llm), []
    options: dict[str, Any] = (
        {"on_logits": lambda logits: seen.append(logits.clone())} if way == "on_logits" else {"forced": [7] * 8}
    )
    one = llm.engine.add_request("one", prompts[0], greedy(8), **options)
    llm.engine.add_request("other", prompts[1], greedy(20, structured_outputs={"regex": "[a-z ]{600}"}))
    while llm.engine.has_work:
        llm.engine.step()
    assert one.request.output_token_ids == ([int(logits.argmax()) for logits in seen] or [7] * 8)
    assert {*launched} == {(1, 0)}, "once it has ended"


def test_tokens_under_way_can_be_awaited(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=14)
    params: SamplingParams = greedy(12, structured_outputs=REGEX)
    expected = llm.generate(prompts[1], params)[0].token_ids
    ahead(llm)
    one = llm.engine.add_request("one", prompts[1], params)
    for _ in range(3):
        llm.engine.step()
    made = len(one.request.output_token_ids)
    assert llm.engine.catch_up() == [one] and len(one.request.output_token_ids) == made + 1 and llm.engine._ahead is None
    while llm.engine.has_work:
        llm.engine.step()
    assert one.request.output_token_ids == expected


def test_answers_behind_free_thinking(tmp_path: Any) -> None:
    """Whether the grammar has begun is known with the token before: masks are of that moment."""
    path = save_speaking(tmp_path, "um, hi</think>ok", "{{ messages[0].content }}>", special=True)
    llm = LLM(path, config=SpeContextConfig(method="full"), device="cpu")
    launched = ahead(llm)
    end = llm.tokenizer("</think>", add_special_tokens=False)["input_ids"][0]
    thinking = Thinking(True, end="</think>", end_id=end)
    params = SamplingParams(temperature=0, max_tokens=60, thinking=thinking, structured_outputs={"choice": ["yes", "no"]})
    [output] = llm.generate("q>", params)[0].outputs
    assert output.reasoning == "um, hi" and output.text in ("yes", "no") and output.finish_reason == "stop" and launched
