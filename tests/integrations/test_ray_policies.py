"""What is decided about replicas on Ray, without Ray: who answers, how many there are, and what they say together."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from specontext.cli.deploy import wanted_of
from specontext.errors import ConfigError, SpeContextError
from specontext.integrations.ray_serve.call import joined
from specontext.integrations.ray_serve.merging import merged_metrics, merged_status
from specontext.integrations.ray_serve.prefixes import FIRST, PrefixTable, prefix_marks
from specontext.integrations.ray_serve.scaling import Use, scale, wanted_replicas
from specontext.integrations.ray_serve.settings import DeployConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
LONG = "All that is known of apples, pears and plums. " * 40
IDLE = {"a": 0, "b": 0, "c": 0}


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts]}


@pytest.mark.parametrize(
    "one, other",
    [
        (chat(LONG + "What of apples?"), chat(LONG + "And plums?")),
        (chat(LONG), chat(LONG, "and then a second turn")),
        ({"prompt": LONG + "a"}, {"prompt": LONG + "b", "temperature": 0.3, "model": "other"}),
        ({"prompt": list(range(900))}, {"prompt": [*range(900), 4]}),
        ({"input": LONG, "instructions": "Be brief."}, {"input": LONG + "!", "instructions": "Be brief."}),
        ({"system": LONG, **chat("Hello.")}, {"system": LONG, **chat("Good morning.")}),
        ({"tools": [{"name": LONG}], **chat("Hello.")}, {"tools": [{"name": LONG}], **chat("Good morning.")}),
    ],
)
def test_equal_beginnings_have_equal_marks(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = prefix_marks(one), prefix_marks(other)
    common = sum(a == b for a, b in zip(first, second, strict=False))
    assert common >= min(len(first), len(second)) - 2 > 0
    assert first[:common] == second[:common]


def test_other_beginnings_have_other_marks() -> None:
    assert not set(prefix_marks(chat("You know pears." + LONG))) & set(prefix_marks(chat("You know plums." + LONG)))


@pytest.mark.parametrize("body", [None, [], "text", {}, {"prompt": ""}, {"messages": None}, {"prompt": "short"}, {"input": 3}])
def test_what_has_no_long_beginning_has_no_marks(body: Any) -> None:
    assert prefix_marks(body) == ()


def test_a_prompt_goes_where_most_of_it_is_known() -> None:
    table = PrefixTable()
    table.note(prefix_marks(chat(LONG + "What of apples?" * 100)), "b")
    table.note(prefix_marks(chat(LONG[:400] + "x" * 900)), "c")
    assert table.order(prefix_marks(chat(LONG + "What of apples?" * 90)), IDLE)[0] == "b"
    assert table.order(prefix_marks(chat(LONG[:400] + "x" * 950)), IDLE)[0] == "c"


def test_of_those_that_know_as_much_the_one_with_least_to_do() -> None:
    table, marks = PrefixTable(), prefix_marks(chat(LONG))
    for replica in ("a", "c"):
        table.note(marks, replica)
    assert table.order(marks, {"a": 3, "b": 0, "c": 2})[0] == "c"


def test_a_replica_with_too_much_to_do_comes_last_whatever_it_knows() -> None:
    table, marks = PrefixTable(), prefix_marks(chat(LONG))
    table.note(marks, "a")
    assert table.order(marks, {"a": 6, "b": 0, "c": 0})[0] == "a"
    assert table.order(marks, {"a": 60, "b": 5, "c": 0})[-1] == "a"


def test_an_unknown_prompt_goes_to_the_same_replica_for_everyone_who_chooses_and_others_elsewhere() -> None:
    prompts = [prefix_marks(chat(f"Document {number}: {LONG}")) for number in range(30)]
    first = [PrefixTable().order(marks, IDLE)[0] for marks in prompts]
    assert first == [PrefixTable().order(marks, dict(reversed(IDLE.items())))[0] for marks in prompts]
    assert set(first) == set(IDLE)


def test_a_prompt_without_a_beginning_goes_where_least_is_to_do() -> None:
    assert PrefixTable().order((), {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]


def test_a_replica_that_is_gone_is_forgotten_and_so_are_old_marks() -> None:
    table, marks = PrefixTable(most=30), prefix_marks(chat(LONG))
    table.note(marks, "a")
    table.keep({"b", "c"})
    assert table.order(marks, IDLE) == PrefixTable().order(marks, IDLE)
    table.note(marks, "b")
    for number in range(8):
        table.note(prefix_marks(chat(f"{number}" * 4 * FIRST)), "c")
    assert len(table._seen) <= 30
    assert table.order(marks, IDLE) == PrefixTable().order(marks, IDLE)


@pytest.mark.parametrize(
    "uses, elsewhere, wanted",
    [
        ([Use(0, 0, 16, 0.0)], 0, 1),
        ([Use(12, 0, 16, 0.1)], 0, 1),
        ([Use(16, 16, 16, 0.1)], 0, 2),  # as many wait as run
        ([Use(16, 8, 16, 0.1), Use(16, 8, 16, 0.1)], 0, 3),
        ([Use(2, 6, 16, 0.9)], 0, 4),  # KV bounds what runs
        ([Use(4, 0, 16, 0.95)], 0, 2),
        ([Use(16, 0, 16, 0.1)] * 4, 0, 5),  # all seats are taken: none is to spare
        ([Use(2, 0, 16, 0.1)] * 4, 0, 1),
        ([Use(4, 0, 16, 0.5)] * 4, 0, 3),
        ([Use(0, 0, 16, 0.0)], 5, 5),
        ([], 0, 1),
    ],
)
def test_as_many_replicas_as_seats_kv_and_what_waits_ask_for(uses: list[Use], elsewhere: float, wanted: int) -> None:
    assert wanted_replicas(uses, elsewhere) == wanted


def test_scaling_reads_what_replicas_report_and_changes_nothing_before_they_do() -> None:
    context = SimpleNamespace(aggregated_metrics=None, total_queued_requests=None, target_num_replicas=3)
    assert scale(context)[0] == 3
    context.aggregated_metrics = {"running": {"a": 16.0, "b": 16.0}, "waiting": {"a": 32.0, "b": 0.0}}
    context.aggregated_metrics |= {"seats": {"a": 16.0, "b": 16.0}, "kv": {"a": 0.2, "b": 0.2}}
    assert scale(context)[0] == 4


def test_metrics_of_all_replicas_are_one_exposition() -> None:
    found = {}
    for name, value in (("a", 1.0), ("b", 2.0)):
        registry = CollectorRegistry()
        Counter("specontext:tokens", "Tokens.", ("model_name",), registry=registry).labels("nano").inc(value)
        Gauge("plain", "A gauge.", registry=registry).set(value)
        found[name] = list(registry.collect())
    families = {family.name: family for family in text_string_to_metric_families(merged_metrics(found).decode())}
    values = {(s.name, s.labels["replica"]): s.value for family in families.values() for s in family.samples}
    assert values["specontext:tokens_total", "a"] == 1.0
    assert values["specontext:tokens_total", "b"] == 2.0
    assert values["plain", "b"] == 2.0
    assert all(sample.labels.get("model_name") == "nano" for sample in families["specontext:tokens"].samples)


def test_the_status_of_all_replicas_adds_up() -> None:
    def status(running: int, kv: float, dead: bool = False) -> dict[str, Any]:
        counts = dict.fromkeys(("waiting", "prompt_tokens", "generation_tokens", "preemptions", "loaded_bytes", "stall_s"), 1)
        counts |= dict.fromkeys(("requests_hidden", "device_kv_bytes", "host_kv_bytes", "prefix_bytes", "prefix_queries"), 1)
        latency = {"first_token": (1.5, running), "token": (0.5, 3)}
        return counts | {
            **{"running": running, "device_kv_used": kv, "host_kv_used": 0.0, "overlap": None, "offloaded_layers": running},
            **{"step_s": 0.1 * running, "expected_step_s": None, "expected_overlap": kv},
            **{"prefix_hits": 0, "latency": latency, "requests": [{"request_id": str(running)}], "uptime_s": 5.0 * running},
            **{"dead": dead, "error": "it broke" if dead else None, "model": "nano", "now": 77.0},
        }

    whole = merged_status({"a": status(2, 0.5, dead=True), "b": status(4, 1.0)}, now=3.0)
    assert (whole["running"], whole["waiting"], whole["device_kv_used"], whole["overlap"]) == (6, 2, 0.75, None)
    assert (whole["step_s"], whole["expected_step_s"], whole["expected_overlap"]) == (pytest.approx(0.3), None, 0.75)
    assert whole["latency"] == {"first_token": [3.0, 6], "token": [1.0, 6]}
    assert [request["request_id"] for request in whole["requests"]] == ["2", "4"]
    assert (whole["dead"], whole["error"], whole["now"], whole["offloaded_layers"]) == (False, None, 3.0, 4)
    assert whole["replicas"] == ["a", "b"]


def test_messages_are_joined_without_losing_the_end() -> None:
    start = {"type": "http.response.start", "status": 200, "headers": []}
    parts = [{"type": "http.response.body", "body": body, "more_body": more} for body, more in ((b"a", True), (b"b", False))]
    assert joined([start, *parts]) == [start, {"type": "http.response.body", "body": b"ab", "more_body": False}]
    assert joined(parts[:1]) == parts[:1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"replicas": 4, "max_replicas": 2}, "max_replicas must be at least replicas, 4, got 2"),
        ({"routing": "random"}, "unknown routing 'random': choose one of prefix, balanced"),
        ({"port": 0}, "port must be a number that every node"),
        ({"replica_gpus": -1}, "replica_gpus must be at least 0"),
        ({"upscale_delay": float("nan")}, "upscale_delay must be at least 0"),
        ({"max_queued_requests": 0}, "max_queued_requests must be at least 1"),
    ],
)
def test_settings_that_cannot_be_honoured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeployConfig(**options)


def test_the_manifest_of_kuberay_names_options_that_there_are() -> None:
    manifest = yaml.safe_load((DEPLOY / "kubernetes" / "ray.yaml").read_text())
    served = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert served["http_options"]["keep_alive_timeout_s"] == DeployConfig().timeout_keep_alive
    (found,) = served["applications"]
    module, _, function = found["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    wanted = wanted_of(found["args"])
    assert (wanted.engine.model, wanted.config.replicas, wanted.config.max_replicas) == ("nano", 2, 4)
    assert f"ray:{manifest['spec']['rayClusterConfig']['rayVersion']}-" in (DEPLOY / "ray.Dockerfile").read_text()


def test_args_of_an_application_are_options_as_a_file_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECONTEXT_API_KEY", "one,two")
    args = {"model": "nano", "host-memory": "2GiB", "retrieval_head": "none", "method": "full", "served_model_name": "mine"}
    wanted = wanted_of(args | {"enable_prefix_caching": False, "replica_gpus": 0.5})
    assert (wanted.engine.host_memory, wanted.engine.retrieval_head, wanted.engine.method.method) == (2 << 30, None, "full")
    assert (wanted.config.served_model_name, wanted.config.api_key) == (("mine",), ("one", "two"))
    assert (wanted.engine.enable_prefix_caching, wanted.config.replica_gpus) == (False, 0.5)


@pytest.mark.parametrize(
    "args, message",
    [
        ({}, "must name a model"),
        ({"model": "nano", "port": 8000}, "port cannot stand in the args of an application"),
        ({"model": "nano", "replica": 2}, "the args of the application sets replica, which the command does not have"),
        ({"model": "nano", "replicas": {"min": 2}}, "replicas must be a text, a number, true, false, or a list of texts"),
        ({"model": "nano", "host_memory": "2 barrels"}, "'2 barrels' is not a size"),
        (
            {"model": "nano", "tensor_parallel_size": 2, "max_wait_s": 3.0},
            "max_wait_s does not work with tensor_parallel_size 2",
        ),
    ],
)
def test_args_that_cannot_be_honoured(args: dict[str, Any], message: str) -> None:
    with pytest.raises(SpeContextError, match=message):
        wanted_of(args)
