"""What operators rely on: refusals in log and metrics, paths that are named, keys of the environment, files in deploy/."""

from __future__ import annotations

import json
import logging
import re
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from specontext.cli.api_keys import key_to_send
from specontext.config import EngineConfig
from specontext.errors import ConfigError
from specontext.server.metrics import REFUSALS
from specontext.server.run import allow_open_files, serve
from specontext.server.settings import ServerConfig
from tests.server.serving import Server, make_engine, process, running, wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"


def samples(server: Server) -> dict[tuple[str, str], float]:
    """Values of all series, by name and by the label that is not the model's."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "le")]
            found[sample.name, ",".join(labels)] = sample.value
    return found


def test_refusals_are_counted_and_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("specontext.server")
    before = samples(server)
    assert {code for name, code in before if name == "specontext:request_refused_total"} == set(REFUSALS)
    assert {code for name, code in before if name == "specontext:request_success_total"} == {"stop", "length", "abort", "error"}
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="specontext.server"):
            server.post("/v1/completions", {"prompt": "a", "temperature": "secret word"})
            server.post("/v1/completions", {"prompt": "a", "surprise": 1})
            server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9999})
            server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]})
            server.get("/nowhere")
            server.get("/long" * 5000)
            wait_for(lambda: any("/long" in record.getMessage() for record in caplog.records))
    finally:
        logger.removeHandler(caplog.handler)
    lines = list(dict.fromkeys(record.message for record in caplog.records if record.message.startswith("request ")))
    assert "param=temperature" in lines[0] and "reason=" in lines[0] and "secret" not in lines[0]
    assert "code=unknown_parameter" in lines[1] and "code=context_length_exceeded" in lines[2] and "code=not_found" in lines[4]
    assert "messages.0: content is missing" in lines[3] and "param=messages.0" in lines[3]
    assert "code=not_found" in lines[5] and len(lines[5]) < 1000
    after = samples(server)
    for code, times in {"invalid_request": 2, "unknown_parameter": 1, "context_length_exceeded": 1, "not_found": 2}.items():
        name = ("specontext:request_refused_total", code)
        assert after[name] == before[name] + times, code


def test_metrics_of_a_request(server: Server) -> None:
    before, ended = samples(server), ("specontext:request_success_total", "length")
    server.post("/v1/completions", {"prompt": list(range(700, 740)), "max_tokens": 3, "ignore_eos": True})
    after = wait_for(lambda: (now := samples(server))[ended] > before[ended] and now)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["specontext:request_prompt_tokens_sum", ""] == 40 and grown["specontext:request_generation_tokens_sum", ""] == 3
    assert grown["specontext:iteration_tokens_total_sum", ""] == 42
    for name in ("request_prefill_time_seconds", "request_decode_time_seconds"):
        assert grown[f"specontext:{name}_count", ""] == 1
    assert ("specontext:prefetch_stall_seconds_total", "") in after and after["process_resident_memory_bytes", ""] > 0
    assert "prefix_bytes" in server.get("/status").json()


def test_the_dashboard_asks_for_what_there_is(server: Server) -> None:
    known = {name for name, _ in samples(server)}
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for text in asked for name in re.findall(r"(?:specontext:|process_)\w+", text)}
    assert names <= known and len(names) > 20
    own = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in known if name.startswith("specontext:")}
    shown = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in names}
    assert own <= shown, "every metric has its place on the dashboard"
    documented = (DEPLOY.parent / "docs" / "serving.md").read_text()
    assert not [name for name in own if name.removeprefix("specontext:") not in documented]


def test_unknown_paths_name_those_that_exist(server: Server) -> None:
    for method, path, status, words in (
        ("GET", "/v1/nowhere", 404, "/v1/chat/completions"),
        ("POST", "/v1/embeddings", 404, "embeddings are not made here"),
        ("POST", "/v1/audio/speech", 404, "audio"),
        ("GET", "/v1/chat/completions", 405, "POST"),
    ):
        answer = server.http.request(method, path, json={})
        assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert server.post("/v1/messages/nowhere", {}).json()["type"] == "error"


@pytest.mark.slow
def test_a_second_signal_tells_those_who_wait(tmp_path: Path) -> None:
    import httpx

    flags = ("--max-model-len", "16000", "--shutdown-timeout", "50")
    with process(tmp_path / "log", *flags, forked=True) as served:
        body = {"prompt": "a", "max_tokens": 15000, "ignore_eos": True}
        with httpx.Client(base_url=served.url, timeout=60) as client:
            stream = client.build_request("POST", "/v1/completions", json=body | {"stream": True})
            events = client.send(stream, stream=True)
            lines = events.iter_lines()
            next(lines)
            served.terminate()
            wait_for(lambda: "shutting down" in served.log.read_text())
            served.terminate()
            assert any("shutting_down" in line for line in lines)
        assert served.wait() == 0
    log = served.log.read_text()
    assert all(word in log for word in ("loading model=nano", "loaded seconds=", "warm seconds="))


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("SPECONTEXT_API_KEY", "one, two\n")
    monkeypatch.setattr("specontext.server.run.serve", lambda engine, config, **_: given.update(keys=config.api_key))
    from specontext.cli import main

    assert main(["serve", "nano"]) == 0 and given["keys"] == ("one", "two")
    assert main(["serve", "nano", "--api-key", " three "]) == 0 and given["keys"] == ("three",)
    assert key_to_send(None) == "one" and key_to_send("mine") == "mine"
    monkeypatch.setenv("SPECONTEXT_API_KEY", " ,")
    assert main(["serve", "nano"]) != 0, "a server that nobody closed"
    monkeypatch.setenv("SPECONTEXT_API_KEY", "")
    assert main(["serve", "nano"]) == 0 and given["keys"] == () and key_to_send(None) is None


@pytest.mark.parametrize("key", ["", "  ", "a\nb", "a\0"])
def test_keys_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        ServerConfig(api_key=("good", key))


def test_both_headers_carry_a_key() -> None:
    with running(make_engine(), api_key=("secret", " two words ", "schlüssel")) as server:
        for headers in (
            *({"Authorization": f"{word}secret"} for word in ("Bearer ", "bearer ", "BEARER  ", "Bearer\t")),
            *({"x-api-key": key} for key in ("secret", "two words")),
            {"Authorization": "Bearer", "x-api-key": "secret"},
            {"Authorization": "Bearer two words"},
            {"Authorization": "Bearer schlüssel".encode()},
        ):
            assert server.get("/v1/models", headers=headers).status_code == 200, headers
        for headers in (
            *({}, {"x-api-key": "wrong"}, {"x-api-key": ""}, {"Authorization": "Bearer wrong", "x-api-key": "secret"}),
            *({"Authorization": value} for value in ("secret", "Bearer", "Basic secret", "Bearer secret secret")),
            *({"Authorization": value} for value in ("Bearersecret", 'Bearer "secret"', "Bearer SECRET", "Bearer secret,wrong")),
        ):
            assert server.get("/v1/models", headers=headers).status_code == 401


def commands() -> dict[str, tuple[list[str], float]]:
    """The words behind `specontext` in each file of deploy/, and the seconds that the process has to end after SIGTERM."""
    docker = (DEPLOY / "Dockerfile").read_text()
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", docker, re.MULTILINE)[0]) == ["specontext"]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["specontext"]
    unit = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "specontext.service").read_text(), re.MULTILINE))
    pod = next(yaml.safe_load_all((DEPLOY / "kubernetes" / "specontext.yaml").read_text()))["spec"]["template"]["spec"]
    [container] = pod["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    return {
        "Dockerfile": (json.loads(re.findall(r"^CMD (\[.*)$", docker, re.MULTILINE)[0]), float("inf")),
        "compose.yaml": (compose["command"], float(compose["stop_grace_period"].removesuffix("s"))),
        "specontext.service": (unit["ExecStart"].split()[1:], float(unit["TimeoutStopSec"])),
        "specontext.yaml": (container["args"], pod["terminationGracePeriodSeconds"] - pause),
    }


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "specontext.service", "specontext.yaml"])
def test_commands_of_deploy_are_taken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specontext.cli import main

    given: dict[str, Any] = {}
    monkeypatch.delenv("SPECONTEXT_API_KEY", raising=False)
    monkeypatch.setattr(
        "specontext.server.run.serve", lambda engine, config, **_: given.update(model=engine.model, config=config)
    )
    (config := tmp_path / "specontext.yaml").write_text("port: 8000\n")
    words, grace = commands()[name]
    words = [
        str(config) if word == "/etc/specontext.yaml" else re.sub(r"^\$\{SPECONTEXT_MODEL.*\}$", "nano", word) for word in words
    ]
    assert main(words) == 0 and given["model"] == "nano"
    assert given["config"].port == 8000 and given["config"].shutdown_timeout < grace
    assert given["config"].host == ("127.0.0.1" if name == "specontext.service" else "0.0.0.0")


def test_sigterm_while_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a handler: the first process of a container has no other way to be ended."""
    monkeypatch.setattr("specontext.server.run.make_engine", lambda _: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr("specontext.server.run.configure_logging", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        serve(EngineConfig("nano"), ServerConfig(port=0), announce=lambda *_: None)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_many_connections_may_be_open() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        allow_open_files()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1] and soft in (hard, 65_535)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_files_of_deploy_fit_together() -> None:
    kinds = [each["kind"] for each in yaml.safe_load_all((DEPLOY / "kubernetes" / "specontext.yaml").read_text())]
    assert kinds == ["Deployment", "Service"]
    docker = (DEPLOY / "Dockerfile").read_text()
    extras = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = re.findall(r"'\.\[([\w,]+)\]'", docker + (DEPLOY / "ray.Dockerfile").read_text())
    assert len(wanted) == 3 and {extra for line in wanted for extra in line.split(",")} <= set(extras)
    assert "http://127.0.0.1:8000/health" in docker and "EXPOSE 8000" in docker
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    targets = re.findall(r"^FROM \S+ AS (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert compose["services"]["specontext"]["build"]["target"] in targets and "cuda" in targets
    mounted = [volume.split(":")[0] for name in ("prometheus", "grafana") for volume in compose["services"][name]["volumes"]]
    assert all((DEPLOY / path).exists() for path in mounted)
    copied = re.findall(r"^COPY ((?!--)[^\n]*) \./?\S*$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert all((DEPLOY.parent / path).exists() for line in copied for path in line.split())
