"""What an engine is doing now, in numbers for operators: taken on the engine's thread, read from any other."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from specontext.core import Choice, Request
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.output_statistics import DecodeStatistics, OutputStatistics
from specontext.engine.statistics import Count


@dataclass(frozen=True)
class LiveRequest:
    """One output that is running or waiting; counts are of tokens, times in seconds."""

    request_id: str
    state: str
    prompt_tokens: int
    computed_tokens: int
    completion_tokens: int
    age_s: float
    overlap: float | None
    bytes_loaded_per_step: float | None
    method: str = ""
    budget: int | None = None
    waits_for: str | None = None


@dataclass(frozen=True)
class EngineStatus:
    """An engine at one moment.

    Attributes:
        device_kv_used, host_kv_used: shares of the tiers' pages that are held, 0 to 1.
        stall_s: seconds that steps have waited for layers to leave the device or to come back.
        prefix_bytes: bytes of KV in the host tier that are kept of known prefixes.
        prefix_queries, prefix_hits: prompt tokens that could have been known already, and that were, since the start.
        loaded_bytes: bytes of KV moved from host to device since the start.
        overlap: mean over the decode steps of the live requests, or of the last one that ended.
        step_s, expected_step_s: seconds that a step took in the last stretch of undisturbed decoding, and was expected to take;
            None before there was one.
        expected_overlap: share of what requests read that is expected to be on the device already, as the engine has learned it.
        prompt_tokens, generation_tokens: totals since the start.
        taken_at: `time.perf_counter()`.
    """

    taken_at: float = 0.0
    running: int = 0
    waiting: int = 0
    device_kv_used: float = 0.0
    host_kv_used: float = 0.0
    device_kv_bytes: int = 0
    host_kv_bytes: int = 0
    prefix_bytes: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    offloaded_layers: int = 0
    layers: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    loaded_bytes: float = 0.0
    stall_s: float = 0.0
    overlap: float | None = None
    step_s: float | None = None
    expected_step_s: float | None = None
    expected_overlap: float | None = None
    requests: tuple[LiveRequest, ...] = ()


@dataclass
class StatusMeter:
    """Counts tokens and takes loads; used by the engine's thread only."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    last_overlap: float | None = None
    latest: EngineStatus = field(default_factory=EngineStatus)

    def ended(self, stats: OutputStatistics) -> None:
        """Look at the statistics of an output that has ended."""
        if stats.overlap is not None:
            self.last_overlap = stats.overlap

    def take(self, engine: LLMEngine) -> EngineStatus:
        """How the engine is now, in one reading of the device; also kept as `latest`."""
        now, parts = time.perf_counter(), engine.parts
        running, waiting = list(engine.scheduler.running), list(engine.scheduler.waiting)
        why = engine.scheduler.admission.why_waiting
        decoding = [request.seat for request in running if request.decoding]
        reports, totals = parts.meter.overview(decoding)
        of_seat = dict(zip(decoding, reports, strict=True))
        overlaps = [report.overlap for report in reports if report.overlap is not None]
        self.latest = EngineStatus(
            taken_at=now,
            running=len(running),
            waiting=len(waiting),
            device_kv_used=_used(parts.kv.arena.pages),
            host_kv_used=_used(parts.kv.host.pages),
            device_kv_bytes=_pool_bytes(parts.kv.arena),
            host_kv_bytes=_pool_bytes(parts.kv.host),
            prefix_bytes=parts.prefix.pages * (parts.kv.host.rows.nbytes // max(1, parts.kv.host.pages.num_pages)),
            prefix_queries=parts.prefix.queries,
            prefix_hits=parts.prefix.hits,
            offloaded_layers=len(parts.kv.offloaded),
            layers=engine.loaded.shape.layers,
            preemptions=engine.scheduler.preemptions,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            # Never less than before, though a step that ran ahead may be taken back.
            loaded_bytes=max(self.latest.loaded_bytes, totals[Count.LOADED_BYTES]),
            stall_s=parts.residency.stalled,
            overlap=sum(overlaps) / len(overlaps) if overlaps else self.last_overlap,
            step_s=parts.clock.step_s,
            expected_step_s=parts.clock.expected_s,
            expected_overlap=parts.clock.now.overlap if parts.clock.now.budget is not None else None,
            requests=(
                *(_live(request, "running", now, of_seat.get(request.seat), parts.methods.own) for request in running),
                *(_live(request, "waiting", now, None, parts.methods.own, why(request)) for request in waiting),
            ),
        )
        return self.latest


def _live(
    request: Request, state: str, now: float, report: DecodeStatistics | None, own: Choice, waits_for: str | None = None
) -> LiveRequest:
    choice = request.choice or own
    return LiveRequest(
        request.request_id,
        state,
        request.prompt_length,
        request.computed,
        len(request.token_ids) - request.prompt_length,
        now - request.arrived,
        report.overlap if report is not None else None,
        report.bytes_loaded_per_step if report is not None else None,
        choice.method,
        choice.budget or None,
        waits_for,
    )


def _used(pages: Any) -> float:
    total = pages.num_pages - 1
    return pages.num_held / total if total else 0.0


def _pool_bytes(pool: Any) -> int:
    return pool.rows.nbytes
