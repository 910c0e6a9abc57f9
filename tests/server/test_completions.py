"""Text completions: what comes back is what the offline engine makes, in the shape that OpenAI gives it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

import pytest

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.server.logprobs import echo_logprobs
from specontext.server.token_text import TokenTexts
from tests.server.serving import Server

PATH = "/v1/completions"
FACTS = "Remember the facts in this text. apple = 417.\nQuestion: apple?\nAnswer:"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("nano", config=SpeContextConfig(budget=64, offload_layers=2), device="cpu", max_model_len=2048)


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    with server.client() as client, client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return dict(texts)


def test_a_completion(server: Server, llm: LLM) -> None:
    answer = server.post(PATH, {"model": "nano", "prompt": FACTS, "temperature": 0}).json()
    [output] = llm.generate(FACTS, SamplingParams(temperature=0))
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "nano"
    [choice] = answer["choices"]
    assert choice == {"index": 0, "text": output.text, "logprobs": None, "finish_reason": "stop"}
    assert choice["text"] == " apple = 417."
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(output.prompt_token_ids)
    assert usage["completion_tokens"] == len(output.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    times = ("queue_s", "ttft_s", "tpot_s", "step_s", "expected_step_s", "selection_s_per_step")
    timeless = {name: value for name, value in usage["specontext"].items() if name not in times}
    assert timeless.items() <= output.stats.items()
    assert usage["specontext"]["offload_layers"] == 2 and usage["specontext"]["bytes_loaded_per_step"] is not None


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
        {"n": 3, "temperature": 1.0, "seed": 7},
        {"stop": ["."], "include_stop_str_in_output": True},
        {"stop": "7", "min_tokens": 3},
        {"ignore_eos": True, "max_tokens": 40, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.1},
        {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 9},
        {"stop_token_ids": [17, 20]},
    ],
)
def test_streams_and_parameters(server: Server, llm: LLM, extra: dict[str, Any]) -> None:
    body = {"prompt": FACTS, "temperature": 0, "max_tokens": 24} | extra
    params = SamplingParams(**{name: value for name, value in body.items() if name != "prompt"})
    [expected] = llm.generate(FACTS, params)
    whole = server.post(PATH, body).json()
    chunks = events(server, PATH, body)
    assert [choice["text"] for choice in whole["choices"]] == [output.text for output in expected.outputs]
    assert joined(chunks) == {i: output.text for i, output in enumerate(expected.outputs)}
    reasons = {c["index"]: c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]}
    assert reasons == {c["index"]: c["finish_reason"] for c in whole["choices"]}
    assert whole["usage"]["completion_tokens"] == sum(len(output.token_ids) for output in expected.outputs)
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_comes_last_in_a_stream(server: Server) -> None:
    body = {"prompt": FACTS, "max_tokens": 8, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = events(server, PATH, body)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] <= 16 and last["usage"]["specontext"]["method"] == "speculative"


def test_many_prompts(server: Server, llm: LLM) -> None:
    prompts = ["the sun", FACTS, "a book"]
    ids = [llm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=6)
    expected = [output.text for request in llm.generate(prompts, params) for output in request.outputs]
    body = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 6}
    for given in (prompts, ids):
        answer = server.post(PATH, body | {"prompt": given}).json()
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert joined(events(server, PATH, body | {"prompt": given})) == dict(enumerate(expected))


def test_echo(server: Server) -> None:
    body = {"prompt": ["the sun", FACTS], "temperature": 0, "max_tokens": 4}
    plain = [choice["text"] for choice in server.post(PATH, body).json()["choices"]]
    expected = [prompt + text for prompt, text in zip(body["prompt"], plain, strict=True)]
    echo = body | {"echo": True}
    assert [choice["text"] for choice in server.post(PATH, echo).json()["choices"]] == expected
    assert joined(events(server, PATH, echo)) == dict(enumerate(expected))
    ids = server.post("/tokenize", {"prompt": "the sun", "add_special_tokens": False}).json()["tokens"]
    [choice] = server.post(PATH, {"prompt": ids, "echo": True, "max_tokens": 1}).json()["choices"]
    assert choice["text"].startswith("the sun")
    only = server.post(PATH, echo | {"max_tokens": 0}).json()
    assert [choice["text"] for choice in only["choices"]] == body["prompt"] and only["usage"]["completion_tokens"] == 0
    assert joined(events(server, PATH, echo | {"max_tokens": 0})) == dict(enumerate(body["prompt"]))


def test_logprobs(server: Server, llm: LLM) -> None:
    body = {"prompt": FACTS, "temperature": 0, "max_tokens": 5, "logprobs": 3}
    [output] = llm.generate(FACTS, SamplingParams(temperature=0, max_tokens=5, logprobs=3)).pop().outputs
    [choice] = server.post(PATH, body).json()["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]).startswith(choice["text"])
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(5)]
    for token, value, top, table in zip(
        output.token_ids, found["token_logprobs"], found["top_logprobs"], output.logprobs or [], strict=True
    ):
        assert math.isclose(value, table[token], abs_tol=1e-4)
        assert len(top) == 3 and max(top.values()) == value
    streamed = [c["logprobs"] for chunk in events(server, PATH, body) for c in chunk["choices"] if c["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [x for part in streamed for x in part[name]] == pytest.approx(found[name]) if name == "token_logprobs" else True
        assert name == "token_logprobs" or [x for part in streamed for x in part[name]] == found[name]
    [zero] = server.post(PATH, body | {"logprobs": 0}).json()["choices"]
    assert all(len(top) == 1 for top in zero["logprobs"]["top_logprobs"])


def streamed_logprobs(chunks: list[dict[str, Any]], index: int) -> dict[str, list[Any]]:
    """The lists of one choice, put together."""
    found: dict[str, list[Any]] = defaultdict(list)
    for choice in (c for chunk in chunks for c in chunk["choices"] if c["index"] == index and c["logprobs"]):
        for name, part in choice["logprobs"].items():
            found[name] += part
    return dict(found)


def test_echo_with_logprobs(server: Server, llm: LLM) -> None:
    prompts = ["the sun", FACTS]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 4, "logprobs": 2, "echo": True, "n": 2}
    expected = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=2))
    choices, chunks = server.post(PATH, body).json()["choices"], events(server, PATH, body)
    assert joined(chunks) == {choice["index"]: choice["text"] for choice in choices}
    for index, choice in enumerate(choices):
        prompt, output = prompts[index // 2], expected[index // 2]
        found, tables = choice["logprobs"], (output.prompt_logprobs or []) + (output.outputs[0].logprobs or [])
        tokens = output.prompt_token_ids + output.token_ids
        assert choice["text"] == prompt + output.text
        assert [len(found[name]) for name in found] == [len(tokens)] * 4
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        values = [table[token] for token, table in zip(tokens[1:], tables[1:], strict=True) if table is not None]
        assert found["token_logprobs"][1:] == pytest.approx(values, abs=1e-4)
        for text, value, top, place in list(zip(*found.values(), strict=True))[1:-1]:
            assert 2 <= len(top) <= 3 and value == top[text] <= max(top.values())
            assert choice["text"].startswith(text, place)
        streamed = streamed_logprobs(chunks, index)
        assert streamed["tokens"] == found["tokens"] and streamed["text_offset"] == found["text_offset"]
        assert streamed["token_logprobs"][1:] == pytest.approx(values, abs=1e-4)


def test_log_probabilities_of_nothing_but_the_prompt(server: Server) -> None:
    body = {"prompt": ["the sun", FACTS], "temperature": 0, "logprobs": 1, "echo": True}
    longer = server.post(PATH, body | {"max_tokens": 1}).json()
    for answer in (server.post(PATH, body | {"max_tokens": 0}), server.post(PATH, body | {"max_tokens": 0, "ignore_eos": True})):
        only = answer.json()
        assert only["usage"]["completion_tokens"] == 0
        for choice, more, prompt in zip(only["choices"], longer["choices"], body["prompt"], strict=True):
            assert choice["text"] == prompt and choice["finish_reason"] == "length"
            assert choice["logprobs"]["tokens"] == more["logprobs"]["tokens"][:-1]
            assert choice["logprobs"]["text_offset"] == more["logprobs"]["text_offset"][:-1]
    chunks = events(server, PATH, body | {"max_tokens": 0})
    assert joined(chunks) == dict(enumerate(body["prompt"]))
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]] == ["length"] * 2
    assert streamed_logprobs(chunks, 1)["tokens"] == only["choices"][1]["logprobs"]["tokens"]


def test_limits_of_echoed_logprobs(server: Server) -> None:
    limit = server.engine.parts.max_tokens
    body = {"echo": True, "logprobs": 0, "max_tokens": 0}
    assert server.post(PATH, body | {"prompt": [5] * (limit - 1)}).status_code == 200
    assert server.post(PATH, body | {"prompt": [5] * limit}).json()["error"]["code"] == "context_length_exceeded"
    assert server.post(PATH, body | {"prompt": "a", "logprobs": 21}).status_code == 400
    assert server.post(PATH, {"prompt": "a", "logprobs": 1, "max_tokens": 0}).status_code == 400


def test_marks_that_the_tokenizer_adds_have_no_place_in_the_text(llm: LLM) -> None:
    texts, text = TokenTexts(llm.tokenizer), "a sun – 7"
    tokens = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    [mark] = llm.tokenizer.convert_tokens_to_ids([llm.tokenizer.eos_token])
    tables: list[Any] = [None] * (len(tokens) + 1)
    added = echo_logprobs([mark, *tokens], tables, 1, texts, echo=text)
    plain = echo_logprobs(tokens, tables[1:], 1, texts, echo=text)
    assert added.text_offset == [0, *plain.text_offset]
    written = echo_logprobs([mark, *tokens], tables, 1, texts, echo=llm.tokenizer.eos_token + text)
    assert written.text_offset[1:] == [place + len(llm.tokenizer.eos_token) for place in plain.text_offset]
