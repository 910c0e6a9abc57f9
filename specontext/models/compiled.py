"""Modules through torch.compile, while a step is captured or a prompt is computed: norms, rotary embedding and the like fuse.

Modelling code stays as it is. Attention is a call out of the compiled code, so each decoder layer compiles to what comes before
and what comes after it, whatever functions lie between the layer and that call, and all layers share these two. There is one
compilation for a single token, and one for any other number: graphs of several requests and chunks of all lengths share it, and
no prompt waits for a compiler once the first chunk has run.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import nn

from specontext.gguf.cache import cache_folder
from specontext.models.one_row import compile_one_row

# Where compilers keep what they have made. Their own default, below /tmp, is lost with a container.
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def keep_compiled() -> None:
    """Have kernels that are compiled from now on kept in the cache folder, for processes to come; where somebody has named
    another place, or the folder cannot be written, all stays as it is."""
    for variable, name in CACHES.items():
        folder = cache_folder() / name
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                os.environ.setdefault(variable, str(folder))


@cache
def _settings() -> dict[str, Any]:
    """Of the compiler, as far as this version knows them. Without them each function between a layer and its attention is looked
    at in vain, and layers are compiled in twice as many pieces."""
    asked = {"nested_graph_breaks": True}
    return {name: value for name, value in asked.items() if hasattr(torch._dynamo.config, name)}


class CompiledModules:
    """Methods of modules, many of them alike, that are compiled when they are first run inside `use`: once for one token, where
    products become reductions, which read weights at full speed, and once for any other number of tokens.

    Args:
        parts: modules and names of their methods.
    """

    def __init__(self, parts: Sequence[tuple[nn.Module, str]]) -> None:
        self._parts = list(parts)
        self._functions: dict[bool, list[Any]] = {}

    @contextmanager
    def use(self, tokens: int) -> Iterator[None]:
        """Inside, they run compiled for that many tokens."""
        single = tokens == 1
        if single not in self._functions:
            if not self._functions:
                # What the compiler has looked at stays in cycles, and the modules with it, until they are searched for.
                weakref.finalize(self, gc.collect).atexit = False
            self._functions[single] = self._compiled(single)
        before = [vars(module).get(name) for module, name in self._parts]  # others may have put theirs at a module
        try:
            for (module, name), function in zip(self._parts, self._functions[single], strict=True):
                setattr(module, name, function)
            with torch._dynamo.config.patch(_settings()):
                yield
        finally:
            for (module, name), own in zip(self._parts, before, strict=True):
                if own is not None:
                    setattr(module, name, own)
                else:
                    vars(module).pop(name, None)

    def _compiled(self, single: bool) -> list[Any]:
        # Alike modules differ in their weights only, which are inputs of the compiled code; a limit counts them all the same.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(self._parts))
        backend: Any = compile_one_row if single else "inductor"
        return [torch.compile(getattr(module, name), backend=backend, dynamic=not single) for module, name in self._parts]
