"""The clients that people have, against a real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.serving import Server, make_engine, running

openai = pytest.importorskip("openai")

FACTS = "Remember the facts in this text. apple = 417.\nQuestion: apple?"
MESSAGES: Any = [{"role": "user", "content": FACTS}]


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    with running(make_engine(), api_key=("secret",)) as server:
        yield server


@pytest.fixture(scope="module")
def client(locked: Server) -> Any:
    return openai.OpenAI(base_url=locked.url + "/v1", api_key="secret", max_retries=0)


def test_openai_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="nano", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == " apple = 417." and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.specontext["offloaded_layers"] == 2


def test_openai_chat_streams(client: Any) -> None:
    stream = client.chat.completions.create(
        model="nano", messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " apple = 417."
    assert last.choices == [] and last.usage.completion_tokens == 5


def test_openai_completions(client: Any) -> None:
    answer = client.completions.create(model="nano", prompt=FACTS + "\nAnswer:", temperature=0, logprobs=2, max_tokens=8)
    assert answer.choices[0].text == " apple = 417."
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens
    pieces = client.completions.create(model="nano", prompt=["a", "b"], n=2, max_tokens=3, stream=True)
    assert {choice.index for piece in pieces for choice in piece.choices} == {0, 1, 2, 3}


def test_openai_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(
        model="nano", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3, extra_body={"top_k": 5, "min_tokens": 2}
    )
    content = answer.choices[0].logprobs.content
    assert all(len(item.top_logprobs) == 3 and math.exp(item.logprob) <= 1 for item in content)
    assert "".join(item.token for item in content).startswith(" apple = 417.")


def test_openai_errors(client: Any, locked: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=locked.url + "/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(model="nano", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.value.param == "tools" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="nano", prompt=[5] * 3000)
    assert long.value.code == "context_length_exceeded"
    assert [model.id for model in client.models.list()] == ["nano"] and client.models.retrieve("nano").owned_by


def test_openai_streams_can_be_left(client: Any, locked: Server) -> None:
    stream = client.completions.create(model="nano", prompt="a", max_tokens=1900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    locked.check_idle()


def test_langchain(locked: Server) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="nano", base_url=locked.url + "/v1", api_key="secret", temperature=0, max_tokens=20)
    assert chat.invoke(FACTS).content == " apple = 417."
    assert "".join(piece.content for piece in chat.stream(FACTS)) == " apple = 417."
    assert [message.content for message in chat.batch([FACTS] * 3)] == [" apple = 417."] * 3


def lm_eval_model(server: Server) -> Any:
    pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from specontext.locations import NANO

    return LocalCompletionsAPI(
        model="nano",
        base_url=server.url + "/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(NANO),
        num_concurrent=1,
        max_retries=1,
        max_length=2048,
        max_gen_toks=16,
    )


def test_lm_eval_generates(server: Server) -> None:
    from lm_eval.api.instance import Instance

    model = lm_eval_model(server)
    questions = [FACTS + "\nAnswer:", FACTS.replace("417", "528") + "\nAnswer:"]
    requests = [
        Instance("generate_until", doc={}, arguments=(text, {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}), idx=i)
        for i, text in enumerate(questions)
    ]
    assert [text.strip(" .") for text in model.generate_until(requests)] == ["apple = 417", "apple = 528"]


def test_lm_eval_judges(server: Server) -> None:
    from lm_eval.api.instance import Instance

    model = lm_eval_model(server)
    pairs = [(FACTS + "\nAnswer:", " apple = 417."), (FACTS + "\nAnswer:", " apple = 528.")]
    right, wrong = model.loglikelihood([Instance("loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)])
    assert right[0] > wrong[0] and right[1] and not wrong[1]
