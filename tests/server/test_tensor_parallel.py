"""`specontext serve --tensor-parallel-size 2`: answers as one process does, and ends with its ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from specontext import LLM, SamplingParams
from specontext.config import SpeContextConfig
from tests.server.serving import PATIENCE, process, wait_for

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")


def ranks_of(server: int) -> list[int]:
    """Processes of the other ranks."""
    children = [int(child) for file in Path(f"/proc/{server}/task").glob("*/children") for child in file.read_text().split()]
    return [child for child in children if b"rank_worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


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


@pytest.mark.slow
def test_ranks_end_with_the_server(tmp_path: Path) -> None:
    with process(tmp_path / "log", *"--tensor-parallel-size 2 --method full --max-model-len 1024".split()) as server:
        [rank] = ranks_of(server.popen.pid)
        os.kill(server.popen.pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{rank}").exists() or "Z" in Path(f"/proc/{rank}/stat").read_text().split()[2])
