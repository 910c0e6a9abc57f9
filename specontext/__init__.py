"""SpeContext: long-context inference that reads only the KV entries a retrieval head chooses before the model runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Threads that wait for each other sleep instead of spinning: with spinning, a small model is thirty times slower on two cores
# as soon as another process takes one of them. To be said before torch is loaded; a value that is set already stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from specontext.config import EngineConfig, SpeContextConfig
from specontext.core import CompletionOutput, RequestOutput
from specontext.errors import ConfigError, SpeContextError
from specontext.sampling_params import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from specontext.engine.llm import LLM
    from specontext.integrations.hf_generate import disable, enable
    from specontext.retrieval.head import RetrievalHead

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "RequestOutput",
    "RetrievalHead",
    "SamplingParams",
    "SpeContextConfig",
    "SpeContextError",
    "StructuredOutputsParams",
    "disable",
    "enable",
]


def __getattr__(name: str) -> Any:
    # The engine and its libraries take seconds to import; names that need them load them when asked for.
    if name == "LLM":
        from specontext.engine.llm import LLM

        return LLM
    if name in ("enable", "disable"):
        from specontext.integrations import hf_generate

        return getattr(hf_generate, name)
    if name == "RetrievalHead":
        from specontext.retrieval.head import RetrievalHead

        return RetrievalHead
    raise AttributeError(f"module 'specontext' has no attribute '{name}'")
