"""The engine behind the generate() of one enabled model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from specontext.config import EngineConfig, SpeContextConfig
from specontext.engine.led import LedEngine
from specontext.engine.start import check_surroundings
from specontext.errors import ModelError, RequestError, SpeContextError
from specontext.integrations.hf_cache import EngineCache, check_arguments
from specontext.models.attention import ATTENTION_NAME, attention_of, forget_running
from specontext.models.loading import adopt_model
from specontext.models.rope import LentRope, moving_rope

logger = logging.getLogger("specontext")
# What the library calls a cache among the arguments and results of a forward pass: past_key_values, and later cache.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class Enabled:
    """The engine behind one model's generate().

    It holds no reference to the model itself, so that a model that is dropped is freed at once, and its engine with it.

    Attributes:
        statistics: of each row of the last call of generate(), as in `RequestOutput.stats`; None for one that waited at its end.
    """

    def __init__(
        self, model: PreTrainedModel, retrieval_head: str | Path | None, config: SpeContextConfig, options: Mapping[str, Any]
    ) -> None:
        check_surroundings()
        self.loaded = adopt_model(model)
        self.statistics: list[dict[str, object] | None] = []
        self._lock = threading.RLock()
        self._rope = LentRope(moving_rope(self.loaded.model))
        self._weights = self._addresses()
        self._calls = threading.local()
        self._engine: LedEngine | None = None
        with self._computing():
            self._engine = LedEngine(EngineConfig(self.loaded.name, retrieval_head, config, **options), self.loaded)
        self._watch(False)

    @property
    def engine(self) -> LedEngine:
        assert self._engine is not None
        return self._engine

    @property
    def closed(self) -> bool:
        return self.engine.closed

    def close(self) -> None:
        """Close the engine, and take off the model's layers what it put there."""
        with self._lock:
            self.engine.close()
        forget_running(self.loaded.model)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Inside is one call of generate(), the rows of which end with it."""
        outer = getattr(self._calls, "caches", None)
        caches: list[EngineCache] = []
        self._calls.caches = caches
        try:
            yield
        finally:
            self._calls.caches = outer
            with self._lock:
                for cache in caches:
                    cache.close()
            if caches:
                self.statistics = [one.as_dict() if one is not None else None for one in caches[-1].statistics]

    def new_cache(self, config: GenerationConfig) -> EngineCache:
        """The rows of a call of generate() that begins.

        Raises:
            RequestError: it is not one of `generate`.
            ModelError: the weights have been moved or exchanged.
        """
        caches: list[EngineCache] | None = getattr(self._calls, "caches", None)
        if caches is None:
            raise RequestError("an enabled model computes tokens in model.generate(...) only")
        if self._addresses() != self._weights:
            raise ModelError("the model's weights were moved or exchanged after specontext.enable: call it again")
        limit = self.engine.parts.max_tokens
        if config.max_length > limit:
            logger.warning(
                "max_length %d is more than the longest context of %d tokens: outputs end there", config.max_length, limit
            )
            config.max_length = limit
        ends = getattr(config, "_eos_token_tensor", None)
        end_token_ids = frozenset(ends.flatten().tolist() if ends is not None else ())
        cache = EngineCache(self.engine, config.max_length, end_token_ids)
        caches.append(cache)
        return cache

    def advance(self, cache: EngineCache, arguments: dict[str, Any]) -> CausalLMOutputWithPast:
        """A step: what the model's forward returns for one, logits [N, 1, V] and the rows."""
        if cache.engine is not self._engine:
            raise RequestError("this cache belongs to another model, or to settings that this one had before")
        given = [arguments.pop(name, None) for name in ("input_ids", "attention_mask", "position_ids")]
        if given[0] is None:
            raise RequestError("generate() was given embeddings, and a retrieval head reads tokens: give input_ids")
        check_arguments(arguments)
        check_surroundings()
        with self._lock, self._computing():
            logits = cache.advance(*given)
        output: dict[str, Any] = {"logits": logits[:, None], CACHE: cache}
        return CausalLMOutputWithPast(**output)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inside, the model's layers are the engine's."""
        with attention_of(self.loaded.model, ATTENTION_NAME), self._rope.lent():
            self._watch(True)
            try:
                yield
            finally:
                self._watch(False)

    def _watch(self, watching: bool) -> None:
        if self._engine is not None and not self._engine.closed and self._engine.runner.taps is not None:
            self._engine.runner.taps.watching = watching

    def _addresses(self) -> tuple[int, ...]:
        """Where the weights lie; captured steps read from there."""
        return tuple(parameter.data_ptr() for parameter in self.loaded.model.parameters())

    def __deepcopy__(self, _: dict[int, Any]) -> None:
        return None  # the copy of a model is an ordinary one

    def __reduce__(self) -> NoReturn:
        raise SpeContextError("an enabled model cannot be pickled: call specontext.disable(model) first, or save_pretrained")
