"""Chat completions, the tokenizer's endpoints and what else clients can ask."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from specontext import LLM, SamplingParams, SpeContextConfig, __version__
from tests.server.serving import Server, make_engine, running, wait_for
from tests.server.test_completions import events

PATH = "/v1/chat/completions"
FACTS = "Remember the facts in this text. apple = 417.\nQuestion: apple?"
MESSAGES = [{"role": "user", "content": FACTS}]


@pytest.fixture(scope="module")
def expected() -> Any:
    llm = LLM("nano", config=SpeContextConfig(budget=64, offload_layers=2), device="cpu", max_model_len=2048)
    tokens = llm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    [output] = llm.generate([tokens], SamplingParams(temperature=0, max_tokens=40, logprobs=2))
    return output


def test_a_chat(server: Server, expected: Any) -> None:
    answer = server.post(PATH, {"model": "nano", "messages": MESSAGES, "temperature": 0}).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    nothing = dict.fromkeys(("reasoning", "reasoning_content", "refusal"))
    assert choice["message"] == {"role": "assistant", "content": expected.text} | nothing
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
    assert answer["usage"]["specontext"]["decode_steps"] == expected.stats["decode_steps"]


def test_a_streamed_chat(server: Server, expected: Any) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = events(server, PATH, body)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2 * len(expected.token_ids)
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in mine[1:])
        assert "".join(choice["delta"].get("content", "") for choice in mine) == expected.text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]


def test_options_of_streams(server: Server) -> None:
    for path, prompt in ((PATH, {"messages": MESSAGES}), ("/v1/completions", {"prompt": "the sun"})):
        asked = prompt | {"temperature": 0, "max_tokens": 8, "stream": True}
        for obfuscate in (True, False):
            answer = server.post(path, asked | {"stream_options": {"include_obfuscation": obfuscate, "include_usage": True}})
            found = [line for line in answer.content.split(b"\n\n") if b'"choices":[{' in line]
            assert found and all((len(line) + 2) % 64 == 0 for line in found) == obfuscate
            assert all((b'"obfuscation":"' in line) == obfuscate for line in found)
        refused = server.post(path, asked | {"stream": False, "stream_options": {"include_usage": True}})
        assert refused.status_code == 400 and "stream_options" in refused.json()["error"]["message"]
        assert server.post(path, asked | {"stream": False, "stream_options": None}).status_code == 200


def test_seeds_of_all_kinds(server: Server) -> None:
    def say(seed: int | None) -> str:
        body = {"messages": MESSAGES, "temperature": 5.0, "max_tokens": 12, "ignore_eos": True, "seed": seed}
        return str(server.post(PATH, body).json()["choices"][0]["message"]["content"])

    for seed in (-2, -(2**63), 2**63 - 1, 0):
        assert say(seed) == say(seed)
    assert say(-1) != say(-1) and say(-2) != say(2)  # -1 is no seed at all


def test_lengths(server: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.post(PATH, {"messages": MESSAGES, name: 2}).json()
        assert answer["usage"]["completion_tokens"] == 2 and answer["choices"][0]["finish_reason"] == "length"
    room = {"messages": MESSAGES, "ignore_eos": True, "temperature": 0}
    answer = server.post(PATH, room | {"stop": ["417"]}).json()  # by default as long as the context allows
    assert answer["choices"][0]["message"]["content"] == " apple = "


def test_logprobs(server: Server, expected: Any) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    content = server.post(PATH, body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == len(expected.token_ids)
    for item, token, table in zip(content, expected.token_ids, expected.outputs[0].logprobs, strict=True):
        assert item["logprob"] == pytest.approx(table[token], abs=1e-4)
        assert bytes(item["bytes"]).decode() == item["token"]
        assert len(item["top_logprobs"]) == 2 and item["top_logprobs"][0]["logprob"] >= item["top_logprobs"][1]["logprob"]
    streamed = [
        item
        for chunk in events(server, PATH, body)
        for choice in chunk["choices"]
        if choice["logprobs"]
        for item in choice["logprobs"]["content"]
    ]
    assert [item["token"] for item in streamed] == [item["token"] for item in content]
    none = server.post(PATH, body | {"top_logprobs": None}).json()["choices"][0]["logprobs"]["content"]
    assert all(item["top_logprobs"] == [] for item in none)


def test_parts_and_roles(server: Server) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": part} for part in FACTS.split("\n")]}]
    body = {"temperature": 0}
    assert (
        server.post(PATH, body | {"messages": parts}).json()["choices"][0]["message"]
        == server.post(PATH, body | {"messages": MESSAGES}).json()["choices"][0]["message"]
    )
    talk = [
        {"role": "system", "content": "a"},
        *MESSAGES,
        {"role": "assistant", "content": "417"},
        {"role": "user", "content": "b"},
    ]
    assert server.post(PATH, {"messages": talk, "max_tokens": 1}).status_code == 200


WANTS_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
KNOWS_THREE = "{% for m in messages if m.role in ['system', 'user', 'assistant'] %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [WANTS_PARTS, KNOWS_THREE])
def test_every_message_is_in_the_prompt_or_refused(template: str) -> None:
    with running(make_engine(), chat_template=template) as server:

        def prompt(*messages: tuple[str, Any]) -> str:
            body = {"messages": [{"role": role, "content": content} for role, content in messages]}
            answer, chat = server.post("/tokenize", body), server.post(PATH, body | {"max_tokens": 1})
            assert answer.status_code == chat.status_code
            if chat.status_code == 400:
                assert answer.json() == chat.json()
                error = chat.json()["error"]
                return f"{error['param']} {error['message']}"
            assert chat.json()["usage"]["prompt_tokens"] == answer.json()["count"]
            return str(server.post("/detokenize", {"tokens": answer.json()["tokens"]}).json()["prompt"])

        for content in ("apple", [{"type": "text", "text": "apple"}]):
            assert prompt(("user", content)) == "[user]apple"
        assert prompt(("user", "apple"), ("developer", "pear")) == "[user]apple[system]pear"
        told = prompt(("user", "apple"), ("tool", "pear"))
        if template == WANTS_PARTS:
            assert told == "[user]apple[tool]pear"
        else:
            assert told.startswith("messages.1 ") and "'tool'" in told


def test_continuing_a_message(server: Server) -> None:
    talk = [*MESSAGES, {"role": "assistant", "content": " apple ="}]
    body = {"messages": talk, "temperature": 0, "continue_final_message": True, "add_generation_prompt": False}
    assert server.post(PATH, body).json()["choices"][0]["message"]["content"] == " 417."


def test_chat_templates_and_names() -> None:
    template = "{% if shout %}{{ raise_exception('no shouting') }}{% endif %}{{ messages[0].content }}"
    options = {"chat_template": template, "served_model_name": ("small", "nano-1m"), "reasoning_parser": "qwen3"}
    with running(make_engine(), **options) as server:
        listed = server.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["small", "nano-1m"]
        assert listed[0]["root"] == "nano" and listed[0]["max_model_len"] == 2048 and listed[0]["object"] == "model"
        assert server.get("/v1/models/nano-1m").json()["id"] == "nano-1m"
        assert server.post(PATH, {"model": "nano", "messages": MESSAGES}).status_code == 404
        answer = server.post(PATH, {"model": "nano-1m", "messages": MESSAGES, "max_tokens": 1}).json()
        assert answer["model"] == "small"
        bare = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
        assert server.post("/detokenize", {"tokens": bare}).json()["prompt"] == FACTS
        shouting = {"messages": MESSAGES, "chat_template_kwargs": {"shout": True}}
        for path in (PATH, "/tokenize"):
            refused = server.post(path, shouting)
            assert refused.status_code == 400 and "no shouting" in refused.json()["error"]["message"]


def test_tokenizing(server: Server) -> None:
    answer = server.post("/tokenize", {"prompt": "the sun é", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] == 2048
    bare = server.post("/tokenize", {"prompt": "the sun é", "add_special_tokens": False}).json()
    assert bare["token_strs"] is None and bare["tokens"] == answer["tokens"][1:]
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == answer["tokens"][:1]  # the mark that begins every text
    assert server.post("/tokenize", {"prompt": "", "add_special_tokens": False}).json()["count"] == 0
    assert server.post("/detokenize", {"tokens": bare["tokens"]}).json() == {"prompt": "the sun é"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert server.post("/detokenize", {"tokens": [10**9]}).status_code == 400
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert chat["count"] == server.post(PATH, {"messages": MESSAGES, "max_tokens": 1}).json()["usage"]["prompt_tokens"]


def test_health_and_version(server: Server) -> None:
    health = server.get("/health")
    assert health.status_code == 200 and health.content == b""
    assert server.http.head("/health").status_code == 200
    assert server.get("/version").json() == {"version": __version__}


def metrics_of(server: Server) -> dict[str, float]:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {
        sample.name + "".join(f"/{v}" for k, v in sorted(sample.labels.items()) if k not in ("model_name", "le")): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_metrics(server: Server) -> None:
    server.check_idle()
    before = metrics_of(server)
    made = server.post(PATH, {"messages": MESSAGES, "max_tokens": 40, "ignore_eos": True}).json()["usage"]
    wait_for(lambda: metrics_of(server)["specontext:prefetch_bytes_total"] > before["specontext:prefetch_bytes_total"])
    after = metrics_of(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["specontext:prompt_tokens_total"] == made["prompt_tokens"]
    assert grown["specontext:generation_tokens_total"] == made["completion_tokens"] == 40
    assert grown["specontext:request_success_total/length"] == 1
    for name, count in (
        ("time_to_first_token", 1),
        ("inter_token_latency", 39),
        ("request_queue_time", 1),
        ("e2e_request_latency", 1),
    ):
        assert grown[f"specontext:{name}_seconds_count"] == count
    assert after["specontext:offloaded_layers"] == 2 and 0 < after["specontext:selection_overlap"] <= 1
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "host_kv_bytes",
        "prefetch_stall_seconds_total",
    ):
        assert after[f"specontext:{name}"] == 0
    assert after["specontext:num_preemptions_total"] == before["specontext:num_preemptions_total"]


def test_request_ids(server: Server) -> None:
    given = server.get("/version", headers={"x-request-id": "my-id-5"})
    assert given.headers["x-request-id"] == "my-id-5"
    for bad in ("a b", "x" * 500, "é"):
        made = server.get("/version", headers={b"x-request-id": bad.encode()}).headers["x-request-id"]
        assert made != bad and len(made) == 32
