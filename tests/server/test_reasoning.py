"""Thinking and answer are told apart, whole and streamed alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.sampling_params import Thinking
from specontext.server.reasoning import starts_inside
from tests.server.serving import Server, make_engine, running
from tests.server.speaking import save_speaking
from tests.server.test_chat import MESSAGES, PATH
from tests.server.test_completions import events


def test_where_an_output_begins() -> None:
    assert starts_inside("deepseek_r1", "<assistant>") and not starts_inside("qwen3", "<assistant>")
    assert starts_inside("qwen3", "<assistant><think>\n") and starts_inside("deepseek_r1", "<assistant><think>\n")
    assert starts_inside("deepseek_r1", "say </think><assistant>") and not starts_inside("qwen3", "say <think><assistant>")
    assert starts_inside("qwen3", "<assistant><think>\nI think", continued="<think>\nI think")
    assert starts_inside("qwen3", "<assistant><think>\nI think", continued="I think")  # the template has opened it
    assert starts_inside("deepseek_r1", "<assistant>I think", continued="I think")
    assert not starts_inside("qwen3", "say <think><assistant>I think", continued="I think")
    assert not starts_inside("deepseek_r1", "<assistant><think>I think</think> It", continued="<think>I think</think> It")
    assert not starts_inside("deepseek_r1", "<assistant><think>\n\n</think>\n\nIt", continued="It")
    assert starts_inside("qwen3", "<assistant><think>\n" + "long " * 100, continued="<think>\n" + "long " * 100)
    assert not starts_inside("qwen3", "<think>\n\n</think>\n\n") and not starts_inside("deepseek_r1", "<think>\n\n</think>\n\n")


def test_thinking_in_answers() -> None:
    with running(make_engine(), reasoning_parser="deepseek_r1") as server:
        body = {"messages": MESSAGES, "temperature": 0}
        message = server.post(PATH, body).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("apple = 417.", "")
        deltas = [choice["delta"] for chunk in events(server, PATH, body) for choice in chunk["choices"]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "apple = 417."
        assert not any(delta.get("content") for delta in deltas)


def split(server: Server, **fields: Any) -> tuple[str, str, str]:
    """Thinking, answer and why it ended; the same whole and streamed."""
    body = {"messages": [{"role": "user", "content": "q"}], "temperature": 0, "max_tokens": 60, "logprobs": True} | fields
    answer = server.post(PATH, body).json()
    [choice] = answer["choices"]
    message, end = choice["message"], choice["finish_reason"]
    assert message["reasoning"] == message["reasoning_content"]
    *chunks, last = events(server, PATH, body | {"stream_options": {"include_usage": True}})
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for name in ("reasoning", "reasoning_content", "content"):
        assert "".join(choice["delta"].get(name, "") for choice in choices) == (message[name] or "")
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [end]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert tokens == choice["logprobs"]["content"] and len(tokens) == answer["usage"]["completion_tokens"]
    assert last["usage"]["completion_tokens_details"] == answer["usage"]["completion_tokens_details"]
    thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert bool(thought) == bool(message["reasoning"]) and thought <= answer["usage"]["completion_tokens"]
    return message["reasoning"] or "", message["content"], end


OPENING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if open %}<think>{% elif shut %}<think></think>{% else %}>{% endif %}"
)


@pytest.fixture(scope="module", params=[True, False], ids=["special", "added"])
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = save_speaking(tmp_path_factory.mktemp("thinker") / "m", "<think>abc</think>xyz", OPENING, special=request.param)
    engine = make_engine(path, offload_layers=0, max_model_len=128, retrieval_head=None, method={"method": "full"})
    with running(engine, reasoning_parser="qwen3") as server:
        yield server


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("abc", "xyz", "stop")),
        ({"chat_template_kwargs": {"open": True}}, ("abc", "xyz", "stop")),
        ({"chat_template_kwargs": {"shut": True}}, ("", "xyz", "stop")),
        ({"max_tokens": 3}, ("ab", "", "length")),
        ({"stop": ["b", "</think>"]}, ("abc", "xyz", "stop")),
        ({"stop": ["b", "y"]}, ("abc", "x", "stop")),
        ({"stop": ["b", "y"], "include_stop_str_in_output": True}, ("abc", "xy", "stop")),
        ({"chat_template_kwargs": {"open": True}, "stop": "b"}, ("abc", "xyz", "stop")),
        ({"chat_template_kwargs": {"shut": True}, "stop": "y"}, ("", "x", "stop")),
    ],
    ids=str,
)
def test_marks_that_are_tokens(thinker: Server, fields: dict[str, Any], expected: tuple[str, str, str], skip: bool) -> None:
    assert split(thinker, skip_special_tokens=skip, **fields) == expected


def test_a_message_that_is_continued(thinker: Server) -> None:
    for begun, expected in (("<think>a", ("bc", "xyz", "stop")), ("<think>a</think>x", ("", "yz", "stop"))):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": begun}]
        assert split(thinker, messages=messages, continue_final_message=True) == expected


def test_thinking_goes_back_as_it_came(thinker: Server) -> None:
    message = thinker.post(PATH, {"messages": MESSAGES, "temperature": 0}).json()["choices"][0]["message"]
    again = {"messages": [*MESSAGES, message, {"role": "user", "content": "q"}], "max_tokens": 1}
    assert thinker.post(PATH, again).status_code == 200
    message["reasoning"] = "another"
    refused = thinker.post(PATH, again)
    assert refused.status_code == 400 and "reasoning_content" in refused.json()["error"]["message"]


def test_offline_too(tmp_path: Path) -> None:
    path = save_speaking(tmp_path / "m", "<think>abc</think>xyz", OPENING, special=True)
    llm = LLM(path, device="cpu", max_model_len=128, retrieval_head=None, config=SpeContextConfig(method="full"))
    begin, end = llm.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    thinking = Thinking(False, begin_id=begin, end_id=end)
    [output] = llm.generate(["q>"], SamplingParams(temperature=0, thinking=thinking, stop=["b", "z"]))
    assert (output.outputs[0].reasoning, output.text) == ("abc", "xy")
