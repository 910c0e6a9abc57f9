"""What the status page's script makes of a server's answers, run by node on a page of stubs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import specontext.server
from tests.server.serving import Server

PAGE = Path(specontext.server.__file__).parent / "status.html"


@pytest.fixture
def real(server: Server) -> dict[str, Any]:
    """An answer of a server that has nothing to do."""
    server.check_idle()
    found: dict[str, Any] = server.get("/status").json()
    return found


def rendered(*answers: tuple[int, dict[str, Any] | None]) -> list[dict[str, Any]]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here: install it to test the status page's script")
    script = Path(__file__).with_name("status_page.mjs")
    done = subprocess.run([node, script, PAGE], input=json.dumps(answers), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown: list[dict[str, Any]] = json.loads(done.stdout)
    return shown


def test_rates_axes_and_latencies(real: dict[str, Any]) -> None:
    begun = real | {"now": 100.0, "generation_tokens": 1000, "latency": {name: [1.0, 2] for name in real["latency"]}}
    later = begun | {"now": 102.0, "generation_tokens": 1300, "latency": {name: [3.0, 6] for name in real["latency"]}}
    much_later = later | {"now": 190.0, "generation_tokens": 1300}
    first, second, third = rendered((200, begun), (200, later), (200, much_later))
    assert first["texts"]["state"] == "idle" and first["texts"]["generated"] == "" and first["texts"]["token"] == "500 ms"
    assert first["rows"] == [["none"]]
    assert (second["texts"]["generated"], second["texts"]["most"], second["texts"]["half"]) == ("150", "200", "100")
    assert second["plot"] == "120.0,10.5" and third["plot"] == "32.0,10.5 120.0,39.0", "points stand where their time is"
    assert second["texts"]["first_token"] == "500 ms"


def test_a_row_has_method_and_budget_and_why_it_waits(real: dict[str, Any]) -> None:
    live = {"request_id": "0123456789", "prompt_tokens": 4000, "computed_tokens": 1000, "completion_tokens": 0, "age_s": 3.2}
    live |= {"overlap": None, "bytes_loaded_per_step": None, "method": "speculative", "budget": 2048, "waits_for": None}
    running = live | {"state": "running"}
    waiting = live | {"state": "waiting", "method": "full", "budget": None, "waits_for": "those before it", "computed_tokens": 0}
    decoding = running | {"computed_tokens": 4009, "completion_tokens": 9, "overlap": 0.9, "bytes_loaded_per_step": 2048}
    [shown] = rendered((200, real | {"requests": [running, waiting, decoding], "running": 2, "waiting": 1, "requests_hidden": 7}))
    assert shown["rows"] == [
        ["01234567", "running", "speculative 2,048", "4,000", "prefill 25.0 %", "–", "–", "3 s"],
        ["01234567", "waiting for those before it", "full", "4,000", "0", "–", "–", "3 s"],
        ["01234567", "running", "speculative 2,048", "4,000", "9", "90.0 %", "2.0 KiB", "3 s"],
    ]
    assert shown["texts"]["state"] == "working" and shown["texts"]["more"] == "and 7 more"


def test_servers_that_do_not_answer(real: dict[str, Any]) -> None:
    dead = real | {"dead": True, "error": "out of memory"}
    locked, broken, gone, died = rendered((401, None), (500, None), (0, None), (200, dead))
    assert locked["texts"]["state"] == "locked" and "API key" in locked["texts"]["note"]
    assert broken["texts"]["state"] == "error" and gone["texts"]["state"] == "gone"
    assert died["texts"]["state"] == "dead" and died["texts"]["note"] == "out of memory"
