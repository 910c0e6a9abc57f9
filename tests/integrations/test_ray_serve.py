"""Two replicas of nano on a Ray cluster of this machine: killed, asked again, replaced, and found again by their prompts.

One cluster, one replacement and so one test for everything, since each start of a replica takes its seconds.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: specontext[ray]")

import ray

from specontext.config import EngineConfig
from specontext.integrations.ray_serve import application
from specontext.integrations.ray_serve.settings import DeployConfig
from tests.server.serving import PATIENCE, wait_for

STREAMS, KILLED_AFTER, LENGTH = 200, 40, 24
ENGINE = EngineConfig("nano", device="cpu", max_model_len=1024, max_num_seqs=16)
FACTS = " ".join(f"{name} = {number}." for number, name in enumerate(("apple", "pear", "plum", "lime") * 15, start=300))


@dataclass(frozen=True)
class Cluster:
    url: str
    config: DeployConfig

    def replicas(self) -> list[str]:
        """Names of the actors that are replicas of the model."""
        found = ray.util.list_named_actors(all_namespaces=True)
        return [one["name"] for one in found if "specontext#Replica#" in one["name"]]

    def kill_one(self) -> None:
        ray.kill(ray.get_actor(self.replicas()[0], namespace="serve"))

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, verify=False)

    def metrics(self, name: str) -> dict[str, float]:
        """A number of each replica."""
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return {
            line.split('replica="')[1].split('"')[0]: float(line.split()[-1]) for line in lines if line.startswith(name + "{")
        }

    def wait_for_both(self) -> None:
        wait_for(lambda: len(self.metrics("specontext:num_requests_running")) == 2, "two replicas")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = DeployConfig(port=port, replicas=2, replica_cpus=0.5, routing="balanced", log_interval=0, disable_log_requests=True)
    application.connect("local")
    try:
        yield Cluster(application.run(ENGINE, config), config)
    finally:
        application.withdraw()


def body(prompt: str, **options: Any) -> dict[str, Any]:
    return {"model": "nano", "prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": LENGTH} | options


@dataclass
class Told:
    """What a client was told: a text that is whole, or why it is not."""

    text: str
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    status: int = 200


async def stream(http: httpx.AsyncClient, prompt: str) -> Told:
    async with http.stream("POST", "/v1/completions", json=body(prompt, stream=True)) as answer:
        if answer.status_code != 200:
            return Told("", error=json.loads(await answer.aread())["error"], status=answer.status_code)
        told, ended = Told(""), False
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    told.error = data["error"]
                else:
                    told.text += data["choices"][0]["text"]
                    told.finish_reason = data["choices"][0]["finish_reason"] or told.finish_reason
        assert ended, "a stream has an end"
        return told


async def many_streams(cluster: Cluster, at: Callable[[int], None]) -> tuple[list[Told], list[Told]]:
    """What clients were told at first, and in the end, when those who were told of an error have asked again."""
    ended = 0
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE, verify=False, limits=limits) as http:

        async def ask(number: int) -> Told:
            nonlocal ended
            told = await stream(http, f"{number} {FACTS[:60]}")
            ended += 1
            await asyncio.to_thread(at, ended)
            return told

        first = await asyncio.gather(*(ask(number) for number in range(STREAMS)))
        again = [stream(http, f"{number} {FACTS[:60]}") for number, told in enumerate(first) if told.error is not None]
        answers = iter(await asyncio.gather(*again))
        return first, [told if told.error is None else next(answers) for told in first]


def check_all_replicas_stand_behind_one_endpoint(cluster: Cluster) -> None:
    with cluster.http() as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["nano"]
        assert http.get("/health").status_code == 200
        assert len(cluster.metrics("specontext:num_requests_running")) == 2
        assert len(http.get("/status").json()["replicas"]) == 2
        refused = http.post("/v1/completions", json={"model": "nano", "prompt": 3.5})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
        assert http.post("/v1/completions", content=b"{").status_code == 400
        assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
        first = http.post("/v1/responses", json={"model": "nano", "input": "apple = 417.", "max_output_tokens": 16})
        for _ in range(6):  # wherever it goes, the earlier answer is found
            more = {"model": "nano", "input": "apple?", "max_output_tokens": 16, "previous_response_id": first.json()["id"]}
            assert http.post("/v1/responses", json=more).status_code == 200
        assert len(first.headers.get_list("x-request-id")) == 1


def check_a_client_that_leaves_ends_its_request(cluster: Cluster) -> None:
    with cluster.http() as http, http.stream("POST", "/v1/completions", json=body("on and on", max_tokens=900, stream=True)) as s:
        next(s.iter_lines())
    wait_for(lambda: not sum(cluster.metrics("specontext:num_requests_running").values()), "an idle engine")
    assert sum(cluster.metrics("specontext:generation_tokens_total").values()) < 900


def check_streams_end_whole_or_with_an_error_when_a_replica_is_killed(cluster: Cluster) -> None:
    first, last = asyncio.run(many_streams(cluster, lambda ended: cluster.kill_one() if ended == KILLED_AFTER else None))
    lost = [told for told in first if told.error is not None]
    assert lost and len(lost) < STREAMS
    assert {told.error["code"] for told in lost if told.error} == {"replica_lost"}
    assert {told.status for told in lost} <= {200, 503}
    assert all(told.error is None and told.finish_reason == "length" and told.text for told in last)
    assert all(last[number].text.startswith(told.text) for number, told in enumerate(first))  # what was shown was right
    cluster.wait_for_both()


def cached_tokens(cluster: Cluster, label: str) -> int:
    """Tokens that were known of prompts that share beginnings, four and four."""
    prompts = [f"{label} {document}: {FACTS} Then {end}?" for document in range(10) for end in ("a", "b", "c", "d")]
    random.Random(1).shuffle(prompts)
    with cluster.http() as http:
        answers = [http.post("/v1/completions", json=body(prompt, max_tokens=1)).json() for prompt in prompts]
    return sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers)


def check_replicas_are_replaced_without_losing_requests_and_then_found_by_their_prompts(cluster: Cluster) -> None:
    by_chance = cached_tokens(cluster, "balanced")
    before, over, failed, whole = set(cluster.replicas()), threading.Event(), [], 0

    def keep_asking(number: int) -> int:
        count = 0
        with cluster.http() as http:
            while not over.is_set():
                answer = http.post("/v1/completions", json=body(f"{number} {count} apple?"))
                ok = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == LENGTH
                failed.extend([] if ok else [answer.text])
                count += 1
        return count

    with ThreadPoolExecutor(4) as clients:
        asking = [clients.submit(keep_asking, number) for number in range(4)]
        application.run(ENGINE, replace(cluster.config, routing="prefix"))
        over.set()
        whole = sum(each.result() for each in asking)
    assert not failed and whole > 8
    assert not before & set(cluster.replicas())
    by_prefix = cached_tokens(cluster, "prefix")
    assert by_prefix > 1.2 * by_chance


@pytest.mark.slow
def test_two_replicas(cluster: Cluster) -> None:
    check_all_replicas_stand_behind_one_endpoint(cluster)
    check_a_client_that_leaves_ends_its_request(cluster)
    check_streams_end_whole_or_with_an_error_when_a_replica_is_killed(cluster)
    check_replicas_are_replaced_without_losing_requests_and_then_found_by_their_prompts(cluster)


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(application.DeployError, match=rf"no Ray cluster answers at {address}: start one with `ray start"):
            application.connect(address)


def test_why_replicas_do_not_start_is_said_in_their_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's error names deployments; the reason stands in what these say."""
    reason = "no checkpoint directory at missing; give 'nano'"
    traceback = f"The replica failed:\n  File a.py, line 3\nspecontext.errors.ModelError: {reason}\n"
    state = SimpleNamespace(deployments={"Replica": SimpleNamespace(message=traceback), "Ingress": SimpleNamespace(message="")})

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Deploying application specontext failed: Failed to update the deployments ['Replica'].")

    monkeypatch.setattr(application.serve, "start", lambda **_: None)
    monkeypatch.setattr(application, "_get_global_client", lambda: SimpleNamespace(http_config=DeployConfig()))
    monkeypatch.setattr(application.serve, "run", fails)
    monkeypatch.setattr(application.serve, "status", lambda: SimpleNamespace(applications={application.NAME: state}))
    with pytest.raises(application.DeployError, match=f"did not start: {reason}$"):
        application.run(ENGINE, DeployConfig(replica_gpus=0.0))
