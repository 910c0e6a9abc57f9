"""Options of `serve`, and the verbs that talk to a server: `chat`, `bench`."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specontext import LLM
from specontext.cli import main
from specontext.cli.serve import describe
from specontext.errors import ConfigError
from specontext.server.settings import ServerConfig
from tests.server.serving import PATIENCE, Server, make_engine

Outcome = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*words: object) -> Outcome:
        status = main([str(word) for word in words])
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", "99999"], "port"),
        (["--reasoning-parser", "magic"], "deepseek_r1"),
        (["--generation-config", "mine"], "auto"),
        (["--max-body-size", "12XB"], "12XB"),
        (["--max-queued-requests", "0"], "max_queued_requests"),
        (["--api-key", ""], "api_key"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--chat-template", "/no/such/file"], "/no/such/file"),
        (["--config", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_options(run: Callable[..., Outcome], words: list[str], says: str) -> None:
    status, out, err = run("serve", "nano", "--device", "cpu", "--port", "0", *words)
    assert status == 2 and not out and "Traceback" not in err
    assert err.splitlines()[-1].lower().startswith("error: ") and says in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "name: value"),
        ("a: [", "YAML"),
        ("no_such: 1", "no_such"),
        ("port: {a: 1}", "port"),
        ("port: many", "--port"),
        ("", "name"),
        ("budget: 64\nbudget: 65", "sets budget more than once"),
        ("max-model-len: 64\nmax_model_len: 65", "sets max_model_len more than once"),
        pytest.param("a: " + "[" * 20_000, "nested too deeply", id="deep"),
    ],
)
def test_bad_files(run: Callable[..., Outcome], tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    status, out, err = run("serve", "nano", "--config", file)
    assert status == 2 and not out and says in err.splitlines()[-1]


def test_a_port_that_is_taken(run: Callable[..., Outcome]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = run("serve", "nano", "--port", taken.getsockname()[1])
    assert status == 2 and "--port" in err.splitlines()[-1]


def test_chat(server: Server, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = "Remember the facts in this text. apple = 417.\\nQuestion: apple?".replace("\\n", "\n")
    status, out, _ = run("chat", "--base-url", server.url, "--prompt", facts, "--temperature", 0)
    assert (status, out) == (0, " apple = 417.\n")
    lines = iter(["the sun\n", "/new\n", "x" * 5_000_000 + "\n", "the moon\n", "\n"])
    monkeypatch.setattr("sys.stdin.readline", lambda: next(lines), raising=False)
    status, out, err = run("chat", "--base-url", server.url + "/v1/", "--max-tokens", 3, "--temperature", 0)
    assert status == 0 and len(out.splitlines()) == 2
    assert "nano at" in err and "error: This model's maximum context length is" in err
    status, _, err = run("chat", "--base-url", "http://127.0.0.1:1")
    assert status == 1 and "cannot reach" in err


def test_chat_ends_at_once_when_it_is_interrupted_at_its_prompt(interruptible: None) -> None:
    words = [sys.executable, "-m", "specontext.cli", "chat", "--model", "nano"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stderr is not None and "/new begins anew" in popen.stderr.readline()
            popen.send_signal(signal.SIGINT)
            assert popen.wait(PATIENCE / 4) == 130
        finally:
            popen.kill()


@pytest.mark.parametrize("options", [[], ["--no-stream"], ["--request-rate", 40, "--max-concurrency", 2]])
def test_bench_serve(server: Server, run: Callable[..., Outcome], options: list[object]) -> None:
    words = ["--num-prompts", 6, "--input-len", 9, "--output-len", 7, *options]
    status, out, _ = run("bench", "serve", "--base-url", server.url, *words)
    *table, line = out.splitlines()
    found = json.loads(line)
    assert status == 0 and table
    assert found["completed"] == 6 and found["failed"] == 0
    assert found["total_input_tokens"] == 54 and found["total_output_tokens"] == 42
    assert found["total_token_throughput"] == pytest.approx(96 / found["duration"])
    for name in ("ttft", "tpot", "itl", "e2el"):
        for kind in ("mean", "median", "p99"):
            value = found[f"{kind}_{name}_ms"]
            assert (value is None) if "--no-stream" in options and name != "e2el" else value > 0
    server.check_idle()


def test_what_warms_a_server_up_is_not_measured(server: Server, run: Callable[..., Outcome]) -> None:
    """A prompt that was sent before is known, and would be answered too soon."""
    words = ["--num-prompts", 2, "--input-len", 64, "--output-len", 2, "--num-warmups", 3, "--seed", 77]
    found = server.engine.parts.prefix.hits
    status, out, _ = run("bench", "serve", "--base-url", server.url, *words)
    assert status == 0 and json.loads(out.splitlines()[-1])["completed"] == 2
    assert server.engine.parts.prefix.hits == found
    assert run("bench", "serve", "--base-url", server.url, "--num-warmups", -1)[0] == 2
    server.check_idle()


def test_what_warms_the_engine_up_is_not_measured(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[list[int]]] = []
    generate = LLM.generate

    def watched(llm: LLM, prompts: list[list[int]], *arguments: Any, **options: Any) -> Any:
        ran.append(prompts)
        return generate(llm, prompts, *arguments, **options)

    monkeypatch.setattr(LLM, "generate", watched)
    words = ["--device", "cpu", "--max-model-len", 512, "--num-prompts", 3, "--num-warmups", 2, "--input-len", 9]
    assert run("bench", "throughput", "nano", *words, "--output-len", 2)[0] == 0
    warm, measured = ran
    assert (len(warm), len(measured)) == (2, 3) and not any(prompt in measured for prompt in warm)


def test_bench_serve_of_a_server_that_lists_no_models(
    server: Server, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> dict[str, list[object]]:
        return {"data": []}

    monkeypatch.setattr("specontext.cli.bench.fetch_json", nothing)
    words = ["--base-url", server.url, "--num-prompts", 1, "--input-len", 3, "--output-len", 2]
    status, _, err = run("bench", "serve", *words)
    assert status == 1 and "--model and --tokenizer" in err
    assert run("bench", "serve", *words, "--model", "nano", "--tokenizer", "nano")[0] == 0


def test_bench_serve_with_failures(server: Server, run: Callable[..., Outcome]) -> None:
    status, out, err = run("bench", "serve", "--base-url", server.url, "--num-prompts", 2, "--input-len", 5000)
    assert status == 1 and not out and "context" in err
    assert run("bench", "serve", "--base-url", "ftp://x")[0] == 1
    assert run("bench", "serve", "--base-url", server.url, "--num-prompts", 0)[0] == 2


def test_bench_throughput(run: Callable[..., Outcome]) -> None:
    words = ["--device", "cpu", "--max-model-len", 512, "--num-prompts", 3, "--input-len", 9, "--output-len", 5]
    status, out, _ = run("bench", "throughput", "nano", *words)
    found = json.loads(out.splitlines()[-1])
    assert status == 0 and found["output_throughput"] == pytest.approx(15 / found["duration"])


def test_the_line_at_the_start_says_what_fits() -> None:
    def tokens_of(line: str) -> list[int]:
        return [int(number.replace(",", "")) for number in re.findall(r"\(([\d,]+) tokens\)", line)]

    roomy, tight = make_engine(), make_engine(gpu_memory=3_000_000, offload_layers=None)
    for engine in (roomy, tight):
        line = describe(engine)
        full = int(re.findall(r"(\d+) requests of 2048 tokens", line)[0])
        fits = engine.parts.residency.fits_somehow
        assert fits([2048] * full) and (full == 16 or not fits([2048] * (full + 1)))
        assert len(tokens_of(line)) == 2 and "budget 64" in line
    assert "16 requests of 2048 tokens at once" in describe(roomy) and "2 in host memory" in describe(roomy)
    assert "16 shorter ones" in describe(tight) and tokens_of(describe(tight))[0] < 2048


@pytest.mark.parametrize(
    ("template", "why"), [("{% for m in messages %}", "line 1: "), ("{{ 'a' | nope }}", "nope"), (" \n", "it is empty")]
)
def test_a_chat_template_that_is_none_is_refused_before_loading(tmp_path: Path, template: str, why: str) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(template)
    with pytest.raises(ConfigError, match=rf"the chat template .*own\.jinja cannot be used: .*{why}"):
        ServerConfig(chat_template=str(file)).read_chat_template()
    assert ServerConfig(chat_template="hermes").read_chat_template()
    assert ServerConfig(chat_template="{{ messages[0].content }}").read_chat_template()
