"""What the library's code of a config's class knows of entries: it is read, since classes store entries that they pass over."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig


def mentioned(config: PreTrainedConfig, pattern: str) -> bool:
    """Whether the code of a config's class or of its decoder mentions an entry, and so may be trusted to follow it."""
    sources = (inspect.getsource(sys.modules[kind.__module__]) for kind in (type(config), *decoders(config)))
    return any(re.search(rf"\b{pattern}\b", source) for source in sources)


def decoders(config: PreTrainedConfig) -> tuple[type, ...]:
    """The library's classes of decoders for a config; none where it knows none."""
    for auto in (AutoModelForCausalLM, AutoModel):  # the latter for the decoder of a model that reads images too
        if type(config) in auto._model_mapping:
            found: Any = auto._model_mapping[type(config)]
            return found if isinstance(found, tuple) else (found,)
    return ()
