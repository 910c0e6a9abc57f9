"""Outputs that follow a grammar: whatever the model would rather write, the batch, the tiers and the sampling."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from specontext import LLM, SamplingParams, SpeContextConfig, StructuredOutputsParams
from specontext.errors import DeviceMemoryError, RequestError, SpeContextError
from specontext.sampling_params import MOST_CHOICES, Thinking
from tests.server.speaking import save_speaking

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "size", "tags", "inner"],
    "additionalProperties": False,
    "$defs": {
        "inner": {
            "type": "object",
            "properties": {"yes": {"type": "boolean"}},
            "required": ["yes"],
            "additionalProperties": False,
        }
    },
}
FACTS = "Remember the facts in this text. apple = 417.\nQuestion: apple?\nAnswer:"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("nano", config=SpeContextConfig(budget=64, offload_layers=2), device="cpu", max_model_len=512, max_num_seqs=8)
    yield llm
    llm.engine.check_integrity()


def follow(llm: LLM, wanted: Any, **options: Any) -> Any:
    params = {"temperature": 1.0, "seed": 5, "max_tokens": 200, "structured_outputs": wanted} | options
    return llm.generate(FACTS, SamplingParams(**params))[0].outputs


def check(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "size", "tags", "inner"] and len(found["name"]) <= 8 and 0 <= found["size"] <= 99
    assert set(found["tags"]) <= {"red", "blue"} and len(found["tags"]) <= 2 and isinstance(found["inner"]["yes"], bool)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_a_schema_is_followed_with_nested_objects(llm: LLM, options: dict[str, Any]) -> None:
    first, second = follow(llm, {"json": SCHEMA, "disable_any_whitespace": True}, n=2, logprobs=1, **options)
    for output in (first, second):
        check(output.text)
        assert output.finish_reason == "stop" and len(output.logprobs) == len(output.token_ids)
    if options.get("temperature") != 0:
        assert first.text != second.text


def test_seeds_repeat_and_batch_mates_change_nothing(llm: LLM) -> None:
    params = SamplingParams(
        temperature=1.0,
        seed=5,
        max_tokens=200,
        structured_outputs=StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    )
    free = SamplingParams(temperature=1.0, seed=6, max_tokens=40)
    regex = SamplingParams(temperature=1.0, seed=7, max_tokens=40, structured_outputs={"regex": "[0-9]{9}"})
    alone = [llm.generate(FACTS, each)[0].token_ids for each in (params, free, regex)]
    together = [output.token_ids for output in llm.generate([FACTS] * 3, [params, free, regex])]
    assert alone == together


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2,4}x"}, "[0-9]{3}-[a-f]{2,4}x"),
        ({"choice": ["banana split", "été"]}, "banana split|été"),
        ({"choice": [f"(a|b)* {i}\n$" for i in range(4096)]}, r"\(a\|b\)\* [0-9]{1,4}\n\$"),
        ({"json": {"type": "string", "format": "path", "const": {"format": "path"}["format"]}}, '"path"'),
        ({"grammar": 'root ::= "yes" | "no, " [a-c]'}, "yes|no, [a-c]"),
        ({"grammar": 'start: "on" | "off" WORD\nWORD: /[xyz]/'}, "on|off[xyz]"),
        ({"json": {"const": {"a": 1}}, "disable_any_whitespace": True}, r'\{"a":1\}'),
        ({"json": {"const": {"a": 1}}, "whitespace_pattern": "~"}, r"\{~?\"a\"~?:~?1~?\}"),
        ({"json": True, "json_object": False}, "(?s).+"),
    ],
)
def test_other_kinds(llm: LLM, wanted: Any, pattern: str) -> None:
    for temperature in (0.0, 1.0):
        [output] = follow(llm, wanted, temperature=temperature, max_tokens=60)
        assert output.finish_reason == "length" or re.fullmatch(pattern, output.text), output.text
        assert pattern == "(?s).+" or output.finish_reason == "stop"


def test_an_output_ends_where_nothing_can_follow(llm: LLM) -> None:
    for options in ({"ignore_eos": True}, {"min_tokens": 10}, {"stop_token_ids": [7]}, {"include_stop_str_in_output": True}):
        [output] = follow(llm, {"choice": ["banana"]}, **options)
        assert output.text == "banana" and output.finish_reason == "stop"
    [output] = follow(llm, {"choice": ["banana split"]}, stop=" spl")
    assert output.text == "banana" and output.finish_reason == "stop"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({}, "must name one of"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"json": {"type": "objekt"}}, "cannot be followed"),
        ({"json": "{"}, "not JSON"),
        ({"json": 3}, "must be a JSON schema"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"allOf": [{"$ref": "#/nowhere"}]}}, "cannot be followed"),
        ({"regex": "(("}, "cannot be followed"),
        ({"grammar": "root ::= other"}, "cannot be followed"),
        ({"regex": r"[^\s\S]"}, "no text that fits"),
        ({"json": {"$ref": "#"}}, "no text that fits"),
        ({"grammar": "root ::= root"}, "no text that fits"),
        ({"grammar": "root ::= " + " | ".join(f'"a{i}"' for i in range(2100))}, "items; max is"),
        ({"json": {"format": "uri-template", "type": "string"}}, "uri-template"),
        ({"choice": []}, "choice must be"),
        ({"choice": "ab"}, "choice must be"),
        ({"choice": ["a" * 300_000]}, "at most"),
        ({"other": 1}, "no field other"),
        ({"json": {"const": "\ud800"}}, "cannot be followed"),
        ({"json": {"minimum": -(10**400)}}, "cannot be followed"),
        ({"json": {"$ref": "#"}}, "no text that fits"),
        ({"grammar": "root ::= root"}, "no text that fits"),
        (3, "must be StructuredOutputsParams"),
    ],
)
def test_what_cannot_be_followed_is_refused(llm: LLM, wanted: Any, words: str) -> None:
    with pytest.raises(RequestError, match="structured_outputs") as refused:
        follow(llm, wanted)
    assert words in str(refused.value)
    deep: Any = {}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestError, match="nested too deeply"):
        follow(llm, {"json": deep})


def test_requests_that_end_or_break_in_the_middle_change_nobody_s_masks(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=40, structured_outputs={"regex": "[0-9]{20}"})
    alone = llm.generate(FACTS, params)[0].token_ids
    kept, gone = (engine.add_request(name, FACTS, params) for name in ("kept", "gone"))
    while not gone.request.output_token_ids:
        engine.step()
    engine.abort("gone")
    while engine.has_work:
        engine.step()
    assert kept.request.output_token_ids == alone

    def fail(*_: Any, **__: Any) -> Any:
        raise DeviceMemoryError("no memory")

    broken = engine.add_request("broken", FACTS, params)
    with monkeypatch.context() as patch, pytest.raises(DeviceMemoryError):
        patch.setattr(engine.runner, "run", fail)
        engine.step()
    assert broken.request.finish_reason == "abort" and llm.generate(FACTS, params)[0].token_ids == alone


def test_as_many_choices_as_are_taken_are_followed(llm: LLM) -> None:
    choices = [f"item (no. {number}) of\nall" for number in range(MOST_CHOICES)]
    assert follow(llm, {"choice": choices})[0].text in choices


def test_a_grammar_that_cannot_go_on_fails_its_request_alone(llm: LLM) -> None:
    good = SamplingParams(max_tokens=8, temperature=0.0)
    bad = SamplingParams(max_tokens=8, structured_outputs={"choice": ["7"]}, allowed_token_ids=[5])
    expected = llm.generate(FACTS, good)[0].token_ids
    engine = llm.engine
    one, other = (engine.add_request(name, FACTS, params) for name, params in (("good", good), ("bad", bad)))
    with pytest.raises(SpeContextError, match="no token is left to choose for bad"):
        while engine.has_work:
            engine.step()
    while engine.has_work:
        engine.step()
    assert one.request.output_token_ids == expected and other.request.finish_reason == "abort"


def test_forced_tokens_follow_no_grammar(llm: LLM) -> None:
    with pytest.raises(RequestError, match="structured_outputs"):
        llm.engine.add_request("forced", FACTS, SamplingParams(structured_outputs={"choice": ["a"]}), forced=[5])


def test_tokens_that_are_allowed_biased_or_bad(llm: LLM) -> None:
    greedy = {"temperature": 0.0, "max_tokens": 6}
    assert set(llm.generate(FACTS, SamplingParams(**greedy, allowed_token_ids=[20, 21]))[0].token_ids) <= {20, 21}
    assert llm.generate(FACTS, SamplingParams(**greedy, logit_bias={20: 100}))[0].token_ids == [20] * 6
    assert llm.generate(FACTS, SamplingParams(**greedy))[0].text.startswith(" apple = 417")
    assert " = 4" not in llm.generate(FACTS, SamplingParams(**greedy, bad_words=["= 417"]))[0].text
    assert "apple" not in llm.generate(FACTS, SamplingParams(**greedy, bad_words=["apple"]))[0].text
    for name, value in (("allowed_token_ids", [9999]), ("logit_bias", {9999: 1})):
        with pytest.raises(RequestError, match=f"^{name}: 9999 is not a token id"):
            llm.generate(FACTS, SamplingParams(**greedy, **{name: value}))


@pytest.mark.parametrize("special", [True, None])
def test_thinking_is_free_and_the_answer_is_not(tmp_path: Any, special: bool | None) -> None:
    """With a mark that is a token, and with one that is text and comes in one piece with white space behind it."""
    path = save_speaking(
        tmp_path, "um, hi</think>ok" if special else "um, hi#\nok", "{{ messages[0].content }}>", special=special
    )
    llm = LLM(path, config=SpeContextConfig(method="full"), device="cpu")
    end = llm.tokenizer("</think>", add_special_tokens=False)["input_ids"][0] if special else None
    thinking = Thinking(True, end="</think>" if special else "#", end_id=end)
    params = SamplingParams(temperature=0, max_tokens=60, thinking=thinking, structured_outputs={"choice": ["yes", "no"]})
    [output] = llm.generate("q>", params)[0].outputs
    assert output.reasoning == "um, hi" and output.text in ("yes", "no") and output.finish_reason == "stop"


def test_an_answer_may_begin_with_thinking(tmp_path: Any) -> None:
    path = save_speaking(tmp_path, "<think>hm</think>ok", "{{ messages[0].content }}>", special=True)
    llm = LLM(path, config=SpeContextConfig(method="full"), device="cpu")
    begin, end = llm.tokenizer("<think></think>", add_special_tokens=False)["input_ids"]
    thinking = Thinking(False, begin_id=begin, end_id=end)
    params = SamplingParams(temperature=0, max_tokens=60, thinking=thinking, structured_outputs={"choice": ["yes", "no"]})
    [output] = llm.generate("q>", params)[0].outputs
    assert output.reasoning == "hm" and output.text in ("yes", "no")


@pytest.mark.slow
def test_requests_that_waited_go_on_in_their_grammars(make_llm: Any) -> None:
    """Tiers too small for all of them: they wait with their KV on the host, and write what they would have written alone."""
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=tokens, structured_outputs={"regex": "[a-z ]{600}"})
        for seed, tokens in enumerate((140, 150, 120))
    ]
    page = 16 * 2 * 2 * 24 * 4  # tokens, KV heads, K and V, head dim, bytes
    tight = make_llm("llama", budget=12, offload_layers=2, gpu_memory=34 * page, host_memory=120 * page)
    roomy = make_llm("llama", budget=12, offload_layers=2)
    expected = [roomy.generate(FACTS, each)[0].token_ids for each in params]
    assert [output.token_ids for output in tight.generate([FACTS] * 3, params)] == expected
    assert tight.engine.scheduler.preemptions > 0
