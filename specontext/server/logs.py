"""The log: one line an event, `name key=value ...`, to standard error."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Mapping

from specontext.engine.async_engine import AsyncEngine
from specontext.engine.status import EngineStatus

_LONGEST_PATH = 200  # characters


def configure_logging() -> None:
    """Send the package's and uvicorn's lines to standard error, with time and level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name, level in (("specontext", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def fields(event: str, values: Mapping[str, object]) -> str:
    """`event key=value key="two words"`; what is None is left out."""
    return " ".join([event, *(f"{name}={_shown(value)}" for name, value in values.items() if value is not None)])


def shortened(path: str) -> str:
    """A path as lines show it: clients may send very long ones."""
    return path if len(path) <= _LONGEST_PATH else f"{path[:_LONGEST_PATH]}..."


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    plain = text and text.isprintable() and not any(character in ' "=' for character in text)
    if plain:
        return text
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'


async def log_load(engine: AsyncEngine, interval: float) -> None:
    """Write a line about the engine's load every `interval` seconds in which it did something; never returns."""
    logger = logging.getLogger("specontext.server")
    before, then = engine.status, time.perf_counter()
    counted = (engine.prompt_tokens, engine.generation_tokens)
    while True:
        await asyncio.sleep(interval)
        now, status, counts = time.perf_counter(), engine.status, (engine.prompt_tokens, engine.generation_tokens)
        if counts != counted or engine.open_outputs:
            logger.info("%s", fields("load", _rates(engine, before, status, counted, counts, now - then)))
        before, then, counted = status, now, counts


def _rates(
    engine: AsyncEngine,
    before: EngineStatus,
    status: EngineStatus,
    counted: tuple[int, int],
    counts: tuple[int, int],
    seconds: float,
) -> dict[str, object]:
    return {
        "prompt_tok_s": round((counts[0] - counted[0]) / seconds, 1),
        "generation_tok_s": round((counts[1] - counted[1]) / seconds, 1),
        "running": engine.running,
        "waiting": engine.waiting,
        "kv": f"{status.device_kv_used:.1%}",
        "host_kv": f"{status.host_kv_used:.1%}",
        "overlap": None if status.overlap is None else f"{status.overlap:.1%}",
        "loaded_mb_s": round((status.loaded_bytes - before.loaded_bytes) / seconds / 1e6, 2),
    }
