"""What all replicas say, as one answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

_SUMS = (
    *("running", "waiting", "prompt_tokens", "generation_tokens", "preemptions", "loaded_bytes", "stall_s", "requests_hidden"),
    *("device_kv_bytes", "host_kv_bytes", "prefix_bytes", "prefix_queries", "prefix_hits"),
)
_MEANS = ("device_kv_used", "host_kv_used", "overlap", "step_s", "expected_step_s", "expected_overlap")
_MOST = ("offloaded_layers", "uptime_s")


class _Families:
    """Looks like a registry to whoever writes metrics down."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def merged_metrics(replicas: Mapping[str, Sequence[Metric]]) -> bytes:
    """One exposition: every sample with its replica as a label."""
    families: dict[str, Metric] = {}
    for replica, metrics in sorted(replicas.items()):
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit))
            family.samples += [sample._replace(labels={**sample.labels, "replica": replica}) for sample in metric.samples]
    return generate_latest(cast(CollectorRegistry, _Families(families.values())))


def merged_status(replicas: Mapping[str, Mapping[str, Any]], now: float) -> dict[str, Any]:
    """One status: counts added up, shares averaged, requests of all, the rest as the first replica has it.

    Args:
        now: a clock in seconds that all statuses share, which those of the replicas do not.
    """
    found = [status for _, status in sorted(replicas.items())]
    whole = dict(found[0])
    for name in _SUMS:
        whole[name] = sum(status[name] for status in found)
    for name in _MEANS:
        known = [status[name] for status in found if status[name] is not None]
        whole[name] = sum(known) / len(known) if known else None
    names = whole["latency"]
    whole["latency"] = {name: [sum(each) for each in zip(*(s["latency"][name] for s in found), strict=True)] for name in names}
    whole["requests"] = [request for status in found for request in status["requests"]]
    for name in _MOST:
        whole[name] = max(status[name] for status in found)
    dead = all(status["dead"] for status in found)
    return whole | {"now": now, "dead": dead, "error": whole["error"] if dead else None, "replicas": sorted(replicas)}
