"""Models whose layers all have a window: what of an engine's settings has a meaning there.

Each token reads the window as it is, whatever the method, and the windows of a request take the same bytes however long it is.
So there is nothing to select from, to offload or to move. All else is as in other engines: requests, chunks, known prompts.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from specontext.config import EngineConfig, SpeContextConfig
from specontext.errors import ConfigError
from specontext.model_shape import ModelShape
from specontext.retrieval.registry import FULL

logger = logging.getLogger("specontext")


def methods_run(config: EngineConfig, shape: ModelShape) -> tuple[str, ...]:
    """The methods that an engine makes, its own first: those that were asked for, or `full` for all where nothing is selected."""
    return (FULL,) if shape.only_windows else config.all_methods


def without_what_has_no_meaning(config: EngineConfig, shape: ModelShape) -> SpeContextConfig:
    """The method settings of such a model, with all KV on the device; a warning says what makes no difference.

    Raises:
        ConfigError: settings that ask for numbers that there are not.
    """
    if config.measure_recall:
        raise ConfigError("measure_recall has nothing to measure in a model whose layers all have a window: leave it out")
    if config.kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype {config.kv_cache_dtype} has no effect in a model whose layers all have a window, which keep the "
            "model's number format: set it to auto"
        )
    method = config.method
    idle = [f"method {method.method}"] if method.method != FULL else []
    idle += [f"offload_layers {method.offload_layers}"] if method.offload_layers else []
    logger.warning(
        "all %d layers attend to a window of %s tokens, which is read as it is whatever the method, so there is nothing to "
        "select from, to offload or to move%s",
        shape.depth,
        " or ".join(str(size) for size in sorted({window.size for window in shape.windowed})),
        f"; without effect: {', '.join(idle)}" if idle else "",
    )
    return replace(method, offload_layers=0)
