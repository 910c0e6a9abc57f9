"""`specontext serve --tensor-parallel-size 2`: answers as one process does, and ends with its ranks."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from specontext import LLM, SamplingParams
from specontext.config import SpeContextConfig
from tests.server.serving import PATIENCE, Process, process, wait_for

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")


def ranks_of(server: int) -> list[int]:
    """Processes of the other ranks."""
    children = [int(child) for file in Path(f"/proc/{server}/task").glob("*/children") for child in file.read_text().split()]
    return [child for child in children if b"rank_worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_two_ranks_answer_as_one_and_a_lost_one_ends_the_server(tmp_path: Path) -> None:
    text, options = "the sun " * 60, {"max_model_len": 1024, "device": "cpu"}
    llm = LLM("nano", config=SpeContextConfig(budget=64, offload_layers=-1), **options)  # type: ignore[arg-type]
    expected = llm.generate(text, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))[0].text
    flags = "--tensor-parallel-size 2 --budget 64 --offload-layers -1 --max-model-len 1024"
    with process(tmp_path / "log", *flags.split()) as server:
        body = {"prompt": text, "max_tokens": 24, "ignore_eos": True, "temperature": 0}
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
            [rank] = ranks_of(server.popen.pid)
            with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 900, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                os.kill(rank, signal.SIGKILL)
                assert any("rank 1 of 2 is lost" in line for line in lines)
        assert server.wait() == 1


ASK = [{"role": "user", "content": "What is the weather in Oslo and in Rome?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]},
    },
}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "f", "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}}},
}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": ASK, "max_tokens": 20, "n": 2, "temperature": 1.0, "seed": 5, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": ASK, "max_tokens": 120, "tools": [WEATHER], "tool_choice": "required", "temperature": 1.0, "seed": 3}),
    (CHAT, {"messages": ASK, "max_tokens": 60, "response_format": FORM, "temperature": 1.0, "seed": 4}),
    (TEXT, {"prompt": "the sun " * 40, "max_tokens": 12, "echo": True, "logprobs": 2, "temperature": 0}),
    (TEXT, {"prompt": "the sun", "max_tokens": 12, "temperature": 0.8, "top_k": 20, "seed": 1, "presence_penalty": 0.5}),
    (TEXT, {"prompt": "the sun", "max_tokens": 12, "temperature": 0, "logit_bias": {"40": -5.0}, "stop": ["e"]}),
    (TEXT, {"prompt": "the sun", "max_tokens": 9999}),
    (TEXT, {"prompt": [99999999], "max_tokens": 4}),
]


def said(server: Process) -> list[Any]:
    """Answers to all of them, without what differs between any two: numbers that are rounded, times, and names of answers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if key not in ("id", "created", "call_id", "specontext")}
        if isinstance(value, list):
            return [plain(one) for one in value]
        return round(value, 2) if isinstance(value, float) else value

    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        answers = [client.post(path, json=body) for path, body in REQUESTS]
    return [(answer.status_code, plain(answer.json())) for answer in answers]


@pytest.mark.slow
def test_the_whole_api_answers_as_one_process_does(tmp_path: Path) -> None:
    """Then a client leaves in the midst of its stream, and the server is told to end in the midst of another one's."""
    flags = "--budget 64 --max-model-len 1024 --dtype float32 --chat-template hermes".split()
    with process(tmp_path / "one", *flags, forked=True) as server:
        expected = said(server)
    assert [status for status, _ in expected] == [200] * 6 + [400] * 2, [status for status, _ in expected]
    with process(tmp_path / "two", *flags, "--tensor-parallel-size", "2", forked=True) as server:
        for request, mine, other in zip(REQUESTS, said(server), expected, strict=True):
            assert mine == other, request
        body = {"prompt": "the sun", "max_tokens": 600, "ignore_eos": True, "temperature": 0, "stream": True}
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            with client.stream("POST", TEXT, json=body) as answer:
                next(answer.iter_lines())
            idle = re.compile(r"num_requests_running(\{.*\})? 0(\.0)?$", re.MULTILINE)
            wait_for(lambda: idle.search(client.get("/metrics").text), "an idle engine")
            with client.stream("POST", TEXT, json=body | {"max_tokens": 60}) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                server.terminate()
                rest = [line for line in lines if line]
            assert first.startswith("data: ") and rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in "".join(rest)
        assert server.wait() == 0


@pytest.mark.slow
def test_ranks_end_with_the_server(tmp_path: Path) -> None:
    flags = "--tensor-parallel-size 2 --method full --max-model-len 1024".split()
    with process(tmp_path / "log", *flags, forked=True) as server:
        [rank] = ranks_of(server.popen.pid)
        os.kill(server.popen.pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{rank}").exists() or "Z" in Path(f"/proc/{rank}/stat").read_text().split()[2])
