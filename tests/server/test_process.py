"""`specontext serve` as a process: it is ready, it says so, and it ends as it should."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path

import httpx
import pytest
import yaml

from tests.server.serving import PATIENCE, process, wait_for

TEXT = "/v1/completions"


@pytest.mark.slow
def test_a_life(tmp_path: Path) -> None:
    """Started from a file, used by many, told to stop in the middle of it."""
    options = {"served-model-name": ["small", "nano"], "api_key": "hush", "max_num_seqs": 4, "budget": 64, "offload-layers": 2}
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(options | {"shutdown_timeout": 60, "max-model-len": 1024}))
    with process(tmp_path / "log", "--config", str(config), "--max-model-len", "2048") as server:
        assert server.seconds < 60
        started = server.log.read_text()
        assert "max_model_len=2048" in started and "api_key=***" in started and "hush" not in started
        headers = {"Authorization": "Bearer hush"}
        limits = httpx.Limits(max_connections=50)
        with httpx.Client(base_url=server.url, timeout=PATIENCE, headers=headers, limits=limits) as client:
            [model, _] = client.get("/v1/models").json()["data"]
            assert model["id"] == "small" and model["max_model_len"] == 2048
            body = {"prompt": "the sun", "max_tokens": 120, "ignore_eos": True, "temperature": 0}

            def ask(number: int) -> str:
                named = {"X-Request-Id": f"load-{number}"}
                return client.post(TEXT, json=body | {"stream": number % 2 == 0}, headers=named).raise_for_status().text

            with concurrent.futures.ThreadPoolExecutor(16) as threads:
                answers = [threads.submit(ask, number) for number in range(16)]
                wait_for(lambda: (now := client.get("/status").json())["waiting"] == 12 and now["running"] == 4)
                server.terminate()
                for answer in answers:
                    text = answer.result()
                    assert '"length"' in text and (text.startswith("{") or text.endswith("data: [DONE]\n\n"))
        assert server.wait() == 0
        log = server.log.read_text()
        assert "shutting down" in log and "Traceback" not in log
        lines = [line for line in log.splitlines() if "request_id=load-" in line]
        assert len(lines) == 16
        assert all("status=200" in line and "completion_tokens=120" in line and "finish_reason=length" in line for line in lines)


@pytest.mark.slow
def test_two_signals_end_it_at_once(tmp_path: Path) -> None:
    with process(tmp_path / "log", "--shutdown-timeout", "600", forked=True) as server:
        body = {"prompt": "the sun", "max_tokens": 16000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + TEXT, json=body, timeout=PATIENCE) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["object"] == "text_completion"
            server.terminate()
            wait_for(lambda: "shutting down" in server.log.read_text())
            server.terminate()
            assert server.wait() in (0, 1)
