"""Send a workload and note when what came."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from specontext.errors import shown
from specontext.evaluation.traffic.http import Address, Exchange, HttpError
from specontext.evaluation.traffic.workload import Workload


@dataclass
class Record:
    """One request: times are seconds after its sending.

    Attributes:
        gaps: between the pieces of a streamed answer.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    first: float | None = None
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """A whole load test."""

    records: list[Record]
    seconds: float


@dataclass(frozen=True)
class Target:
    """How a server is asked."""

    address: Address
    model: str
    stream: bool = True
    ignore_eos: bool = True
    temperature: float = 0.0


async def measure(
    target: Target, workload: Workload, prompts: list[list[int]], *, done: Callable[[], None] = lambda: None
) -> Run:
    """Send all prompts as the workload says; `done` is called after each answer."""
    places = asyncio.Semaphore(workload.max_concurrency) if workload.max_concurrency else contextlib.nullcontext()
    began = time.perf_counter()

    async def one(prompt: list[int], arrival: float) -> Record:
        if arrival:
            await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
        async with places:
            record = await _request(target, prompt, workload.output_len)
        done()
        return record

    records = await asyncio.gather(*map(one, prompts, workload.arrivals()))
    return Run(list(records), time.perf_counter() - began)


async def _request(target: Target, prompt: list[int], output_len: int) -> Record:
    body: dict[str, Any] = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": target.temperature,
    }
    body |= {"ignore_eos": True} if target.ignore_eos else {}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if target.stream else {}
    record, began = Record(), time.perf_counter()
    try:
        async with Exchange(target.address, "POST", "/v1/completions", body) as answer:
            usage = await (_stream(answer, record, began) if target.stream else _whole(answer))
        record.prompt_tokens, record.completion_tokens = _tokens(usage)
    except HttpError as error:
        record.error = str(error)
    record.total = time.perf_counter() - began
    return record


def _tokens(usage: Any) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, as the server counts them."""
    read, made = (usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens"))
    if not isinstance(read, int) or not isinstance(made, int):
        raise HttpError(f"the server does not say how many tokens it has read and made: usage is {shown(usage)}")
    return read, made


async def _stream(answer: Exchange, record: Record, began: float) -> Any:
    usage = None
    last = began
    async for event in answer.events():
        now = time.perf_counter()
        if event.get("usage"):
            usage = event["usage"]
        if not event.get("choices"):
            continue
        if record.first is None:
            record.first = now - began
        else:
            record.gaps.append(now - last)
        last = now
    return usage


async def _whole(answer: Exchange) -> Any:
    found = await answer.json()
    return found.get("usage") if isinstance(found, dict) else None
