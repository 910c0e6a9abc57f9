"""For operators: GET /health, /version, /metrics, /status and the status page at /."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from specontext import __version__
from specontext.server.context import state_of
from specontext.server.protocol.common import ERROR_RESPONSES
from specontext.server.protocol.others import Version

router = APIRouter()

_PAGE = (Path(__file__).parent.parent / "status.html").read_bytes()
_MOST_SHOWN = 100  # requests on the status page


@router.get("/health", response_class=Response, responses={503: {"description": "The engine is dead."}})
async def health(request: Request) -> Response:
    """200 while the engine lives."""
    return Response(status_code=503 if state_of(request).engine.is_dead else 200)


@router.get("/version", responses=ERROR_RESPONSES)
async def version() -> Version:
    return Version(version=__version__)


@router.get("/metrics", response_class=PlainTextResponse, responses=ERROR_RESPONSES)
async def metrics(request: Request) -> Response:
    """Counters in the text format of Prometheus."""
    return Response(generate_latest(state_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/status", responses=ERROR_RESPONSES)
async def status(request: Request) -> dict[str, Any]:
    """What the status page shows."""
    state = state_of(request)
    status, engine = asdict(state.engine.status), state.engine
    live = status.pop("requests")
    method = engine.engine.parts.method
    return status | {
        "latency": state.metrics.latencies(),
        "running": engine.running,
        "waiting": engine.waiting,
        "prompt_tokens": engine.prompt_tokens,
        "generation_tokens": engine.generation_tokens,
        "now": time.perf_counter(),
        "uptime_s": time.time() - state.started,
        "version": __version__,
        "model": state.model,
        "max_model_len": state.max_model_len,
        "draining": state.draining,
        "dead": engine.is_dead,
        "error": str(engine.error) if engine.is_dead else None,
        "settings": asdict(method),
        "requests": live[:_MOST_SHOWN],
        "requests_hidden": max(0, len(live) - _MOST_SHOWN),
    }


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return Response(_PAGE, media_type="text/html; charset=utf-8")
