"""Metrics in the form of Prometheus; names start with `specontext:`, and are vLLM's where it has the same."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from specontext.engine.async_engine import AsyncEngine
from specontext.engine.orders import Life

PREFIX = "specontext:"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_TOKENS = tuple(float(number * 10**power) for power in range(6) for number in (1, 2, 5))
_STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
_REASONS = ("stop", "length", "abort", "error")
# Why requests were refused, as `code` in their answers says; what has no code of its own is an invalid request.
REFUSALS = (
    *("invalid_request", "unknown_parameter", "context_length_exceeded", "body_too_complex", "body_too_large"),
    "request_timeout",
    *("invalid_api_key", "not_found", "model_not_found", "tools_not_supported", "previous_response_not_found", "item_not_found"),
    *("queue_full", "shutting_down", "engine_dead", "request_failed", "internal_error"),
)


class Metrics:
    """Histograms and counters that the engine's thread and the server feed, and numbers that are read when they are asked for."""

    def __init__(self, model: str) -> None:
        self.registry, self._model = CollectorRegistry(), model
        self._engine: AsyncEngine | None = None
        ProcessCollector(registry=self.registry)
        self._ttft = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _LONG)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of an output.", _SHORT)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From a request's arrival to the end of an output.", _LONG)
        self._queue = self._histogram("request_queue_time_seconds", "From a request's arrival to its place in the batch.", _LONG)
        self._prefill = self._histogram("request_prefill_time_seconds", "From the place in the batch to the first token.", _LONG)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token of an output to its last.", _LONG)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._length = self._histogram("request_generation_tokens", "Tokens of an output.", _TOKENS)
        self._step = self._histogram("iteration_tokens_total", "Tokens that a step computed.", _STEP_TOKENS)
        self._ended = self._counter("request_success", "Outputs that have ended, by reason.", "finished_reason", _REASONS)
        self._refused = self._counter("request_refused", "Requests that were answered with an error, by code.", "code", REFUSALS)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(PREFIX + name, help, ("model_name",), buckets=buckets, registry=self.registry)
        return family.labels(self._model)

    def _counter(self, name: str, help: str, label: str, values: tuple[str, ...]) -> Counter:
        family = Counter(PREFIX + name, help, ("model_name", label), registry=self.registry)
        for value in values:  # there from the start: what begins at one has no rate
            family.labels(self._model, value)
        return family

    def watch(self, engine: AsyncEngine) -> None:
        """Also show this engine's numbers."""
        self._engine = engine
        self.registry.register(self)

    def token(self, seconds: float, *, first: bool) -> None:
        (self._ttft if first else self._itl).observe(seconds)

    def step(self, tokens: int) -> None:
        self._step.observe(tokens)

    def ended(self, life: Life) -> None:
        self._ended.labels(self._model, life.reason).inc()
        self._queue.observe(life.queued)
        if life.reason in ("stop", "length"):
            self._e2e.observe(life.seconds)
            self._prompt.observe(life.prompt_tokens)
            self._length.observe(life.tokens)
            for histogram, seconds in ((self._prefill, life.prefill), (self._decode, life.decode)):
                if seconds is not None:
                    histogram.observe(seconds)

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(self._model, code if code in REFUSALS else "invalid_request").inc()

    def latencies(self) -> dict[str, tuple[float, int]]:
        """Seconds in all, and how many they are, of first tokens, tokens and whole requests."""
        found = {}
        for name, histogram in (("first_token", self._ttft), ("token", self._itl), ("request", self._e2e)):
            [sums] = [sample.value for sample in histogram._child_samples() if sample.name == "_sum"]
            [count] = [sample.value for sample in histogram._child_samples() if sample.name == "_count"]
            found[name] = (sums, int(count))
        return found

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers of this moment; tiers, overlap and loaded bytes are at most half a second old."""
        assert self._engine is not None
        status, engine = self._engine.status, self._engine
        gauges = (
            ("num_requests_running", "Outputs in the batch.", engine.running),
            ("num_requests_waiting", "Outputs that wait for a place in the batch.", engine.waiting),
            ("kv_cache_usage_perc", "Share of the device tier of KV that is in use, 0 to 1.", status.device_kv_used),
            ("host_kv_bytes", "Bytes of the host tier of KV that are in use.", status.host_kv_used * status.host_kv_bytes),
            (
                "prefix_cache_bytes",
                "Bytes of the host tier that known prefixes fill until they are needed.",
                status.prefix_bytes,
            ),
            ("selection_overlap", "Share of a selection that the step before had selected too.", status.overlap or 0.0),
            ("offloaded_layers", "Layers whose KV lives in host memory.", status.offloaded_layers),
        )
        counters = (
            ("prompt_tokens", "Prompt tokens processed.", engine.prompt_tokens),
            ("generation_tokens", "Tokens generated.", engine.generation_tokens),
            ("num_preemptions", "Requests that had to make room for others.", status.preemptions),
            ("prefix_cache_queries", "Prompt tokens that could have been known from earlier prompts.", status.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens that were known from earlier prompts.", status.prefix_hits),
            ("prefetch_bytes", "Bytes of KV moved from host to device.", status.loaded_bytes),
            ("prefetch_stall_seconds", "Seconds that steps have waited for KV to move between the tiers.", status.stall_s),
        )
        for name, help, value in gauges:
            gauge = GaugeMetricFamily(PREFIX + name, help, labels=("model_name",))
            gauge.add_metric((self._model,), value)
            yield gauge
        for name, help, value in counters:
            counter = CounterMetricFamily(PREFIX + name, help, labels=("model_name",))
            counter.add_metric((self._model,), value)
            yield counter
