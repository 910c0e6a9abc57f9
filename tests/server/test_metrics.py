"""What /metrics says after requests of all kinds is what was sent, and what their usage says; nothing that counts ever falls."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from specontext.engine.llm_engine import LLMEngine
from tests.server.serving import Server, make_engine, running, wait_for
from tests.server.test_operators import samples
from tests.server.test_robustness import open_stream

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
LIFE = (
    "time_to_first_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
)
LENGTHS = ("request_prompt_tokens", "request_generation_tokens", "request_decode_time_seconds")
A, B, C = ([number] * 40 for number in (700, 701, 702))


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server whose numbers nobody else moves; one output after another begins, so that prompts are known to their siblings."""
    with running(make_engine(max_num_seqs=4)) as server:
        yield server


def numbers(server: Server) -> dict[str, float]:
    """All series by name and label, without the prefix."""
    return {
        f"{name.removeprefix('specontext:')}{f'={label}' if label else ''}": value
        for (name, label), value in samples(server).items()
    }


def settled(server: Server) -> dict[str, float]:
    """The same when nothing runs any more."""
    server.check_idle()
    return numbers(server)


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    moved = {name: after[name] - before.get(name, 0.0) for name in after}
    gauges = ("num_requests", "kv_cache", "host_kv", "prefix_cache_bytes", "selection_overlap", "offloaded", "process_")
    assert not [name for name, value in moved.items() if value < 0 and not name.startswith(gauges)], "counters never fall"
    return moved


def read_until(stream: socket.socket, *marks: bytes) -> None:
    """Read an answer until it has all of these."""
    seen = b""
    while not all(mark in seen for mark in marks):
        piece = stream.recv(4096)
        assert piece, "the answer has ended"
        seen += piece


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ({"prompt": A, "max_tokens": 3}, [3]),
        ({"prompt": A, "max_tokens": 1}, [1]),
        ({"prompt": B, "max_tokens": 3, "n": 3}, [3] * 3),
        ({"prompt": [C, B, [5] * 7], "max_tokens": 2, "n": 2}, [2] * 6),
        ({"prompt": A, "max_tokens": 2, "echo": True}, [2]),
        ({"prompt": A, "max_tokens": 2, "echo": True, "logprobs": 1}, [2]),
        ({"prompt": A, "max_tokens": 4, "n": 6}, [4] * 6),  # more than there are seats
        ({"prompt": A, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}, [3]),
        ({"messages": [{"role": "user", "content": "apple"}], "max_tokens": 3, "n": 2}, [3, 3]),
    ],
)
def test_counters_agree_with_usage(own: Server, body: dict[str, Any], outputs: list[int]) -> None:
    before, status = settled(own), own.get("/status").json()
    answer = own.post(TEXT if "prompt" in body else CHAT, body | {"temperature": 0, "ignore_eos": True})
    assert answer.status_code == 200
    usage = answer.json() if "stream" not in body else json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
    usage, moved = usage["usage"], grown(before, settled(own))
    count, tokens = len(outputs), sum(outputs)
    assert moved["prompt_tokens_total"] == usage["prompt_tokens"]
    assert moved["generation_tokens_total"] == usage["completion_tokens"] == tokens
    assert moved["prefix_cache_hits_total"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert moved["prefix_cache_queries_total"] <= usage["prompt_tokens"]
    now = own.get("/status").json()
    for name in ("prompt_tokens", "generation_tokens"):
        assert now[name] - status[name] == moved[f"{name}_total"]
    assert moved["request_success_total=length"] == count
    assert all(moved[f"{name}_count"] == count for name in (*LIFE, *LENGTHS))
    assert moved["inter_token_latency_seconds_count"] == tokens - count
    assert moved["request_generation_tokens_sum"] == tokens
    assert moved["iteration_tokens_total_sum"] >= tokens - count + usage["prompt_tokens"] - moved["prefix_cache_hits_total"]


def test_a_stop_string(own: Server) -> None:
    body = {"prompt": A, "temperature": 0, "ignore_eos": True, "max_tokens": 8}
    word = own.post(TEXT, body).json()["choices"][0]["text"].split()[1]
    before = settled(own)
    usage = own.post(TEXT, body | {"stop": word}).json()["usage"]
    moved = grown(before, settled(own))
    assert moved["request_success_total=stop"] == 1 and moved["request_success_total=length"] == 0
    assert moved["generation_tokens_total"] == moved["request_generation_tokens_sum"] == usage["completion_tokens"]


def test_a_mere_echo_is_no_work(own: Server) -> None:
    before = settled(own)
    assert own.post(TEXT, {"prompt": A, "echo": True, "max_tokens": 0}).json()["usage"]["prompt_tokens"] == 40
    moved = grown(before, settled(own))
    assert not {name: value for name, value in moved.items() if value and not name.startswith("process_")}


def test_a_client_that_leaves(own: Server) -> None:
    before = settled(own)
    connection = open_stream(own, {"prompt": A, "max_tokens": 1900, "ignore_eos": True, "n": 2})
    read_until(connection, b'"index":0', b'"index":1')
    connection.close()
    moved = grown(before, settled(own))
    assert moved["request_success_total=abort"] == moved["request_queue_time_seconds_count"] == 2
    assert moved["prompt_tokens_total"] == 40 and moved["generation_tokens_total"] >= 2
    assert not any(moved[f"{name}_count"] for name in ("e2e_request_latency_seconds", *LENGTHS))
    assert not any(value for name, value in moved.items() if name.startswith("request_refused"))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"max_tokens": 9999}, "context_length_exceeded"),
        ({"model": "other"}, "model_not_found"),
        ({"temperature": "hot"}, "invalid_request"),
        ({"surprise": 1}, "unknown_parameter"),
        ({"n": 600}, "invalid_request"),
        ({"stop_token_ids": [10**6]}, "invalid_request"),  # which the engine finds
    ],
)
def test_what_is_refused_moves_one_counter(own: Server, body: dict[str, Any], code: str) -> None:
    before = settled(own)
    assert own.post(TEXT, {"prompt": A} | body).status_code in (400, 404)
    moved = grown(before, settled(own))
    assert {name: value for name, value in moved.items() if value and not name.startswith("process_")} == {
        f"request_refused_total={code}": 1
    }


def test_who_has_to_wait_again_is_not_counted_again(own: Server) -> None:
    before = settled(own)
    streams = [open_stream(own, {"prompt": [800 + i] * 40, "max_tokens": 1900, "ignore_eos": True}) for i in range(2)]
    for stream in streams:
        read_until(stream, b'"index":0')

    seen = numbers(own)
    assert asyncio.run_coroutine_threadsafe(own.serving.state.engine.call(_compute_again), own.loop).result()
    wait_for(lambda: not own.engine.scheduler.waiting)
    grown(seen, numbers(own))
    for stream in streams:
        stream.close()
    moved = grown(before, settled(own))
    assert moved["num_preemptions_total"] == 1 and moved["request_success_total=abort"] == 2
    assert moved["prompt_tokens_total"] == moved["prefix_cache_queries_total"] == 80 and not moved["prefix_cache_hits_total"]
    assert moved["time_to_first_token_seconds_count"] == 2


def _compute_again(engine: LLMEngine) -> bool:
    """Have the request that came last wait, as if the host had no room for what it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.kv, "can_park", lambda *_: False)
        return engine.scheduler.admission.preempt(but=None)
