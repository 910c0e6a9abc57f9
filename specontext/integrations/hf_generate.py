"""`enable` has a Hugging Face model's own generate() choose among logits that an engine computes; `disable` restores it.

generate() stays what it is: it prepares inputs, processes logits, chooses tokens, streams them and stops. In place of a cache it
holds the rows of its call (`EngineCache`), and a forward pass with these is a step of the engine. Everything is done to one
model object: five of its attributes, and what `attention_of` says while the engine computes. Any other use of the model, such as
a forward pass of its owner's, is what it was.
"""

from __future__ import annotations

import inspect
import logging
import threading
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from specontext.config import EngineConfig, SpeContextConfig
from specontext.engine.led import LedEngine
from specontext.errors import ConfigError, ModelError, RequestError, SpeContextError
from specontext.integrations.hf_cache import INSTEAD, EngineCache, check_arguments
from specontext.models.attention import ATTENTION_NAME, attention_of, forget_running
from specontext.models.decoder import fixed_rope, moving_rope
from specontext.models.loading import adopt_model

logger = logging.getLogger("specontext")
ENABLED = "specontext_enabled"  # attribute of a model that is
# What the library calls a cache among the arguments and results of a forward pass: past_key_values, and cache since 5.2x.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
CACHES = ("cache", "past_key_values", "cache_params")
PLAIN_CACHES = (None, "dynamic", "hybrid")  # values of cache_implementation that ask for nothing
NOT_HERE = frozenset(
    "model retrieval_head method dtype device methods seed load_format tensor_parallel_size trust_remote_code revision".split()
)


def enable(
    model: PreTrainedModel,
    retrieval_head: str | Path | None = "auto",
    config: SpeContextConfig | None = None,
    **options: Any,
) -> Enabled:
    """Have `model.generate(...)` read only the KV that a method chooses, until `disable(model)`.

    Greedy search and sampling work with all that generate() itself does: processors, stopping criteria, streamers, batches
    padded on the left, pipelines. Everything else is refused. A model that was enabled already gets the new settings.

    Args:
        model: an ordinary decoder of `AutoModelForCausalLM`, on one device.
        retrieval_head: 'auto' (the checkpoint's own or a known one), a head directory, or None for methods without a head.
        config: selection method, budget and tiers.
        options: other fields of `EngineConfig`, such as max_num_seqs, which bounds a batch. `enable_prefix_caching` is off
            unless it is asked for, since the weights may be trained between two calls.

    Returns:
        What the model then holds: the engine, and statistics of the last call.

    Raises:
        SpeContextError: anything that does not fit; the message says what to do. The model is then as if it were disabled.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"enable takes a model of transformers, got {type(model).__name__}: give a pipeline's .model, and merge an "
            "adapter of peft first (merge_and_unload)"
        )
    disable(model)
    known = {f.name for f in fields(EngineConfig)} - NOT_HERE
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"unknown option {', '.join(unknown)}: enable takes {', '.join(sorted(known))}")
    if model.training:
        raise ModelError("the model is in training mode, in which attention may drop out: call model.eval() first")
    settings: dict[str, Any] = {"enable_prefix_caching": False, "methods": ()} | options
    try:
        enabled = Enabled(model, retrieval_head, config or SpeContextConfig(), settings)
    except BaseException:
        forget_running(model)
        raise
    enabled.put_on(model)
    return enabled


def disable(model: PreTrainedModel) -> None:
    """Restore a model that was enabled, and free what its engine holds; another model is left as it is."""
    enabled = getattr(model, ENABLED, None)
    if isinstance(enabled, Enabled):
        enabled.take_off(model)


class Enabled:
    """The engine behind one model's generate().

    It holds no reference to the model itself, so that a model that is dropped is freed at once, and its engine with it.

    Attributes:
        statistics: of each row of the last call of generate(), as in `RequestOutput.stats`.
    """

    def __init__(
        self, model: PreTrainedModel, retrieval_head: str | Path | None, config: SpeContextConfig, options: Mapping[str, Any]
    ) -> None:
        self.loaded = adopt_model(model)
        self.statistics: list[dict[str, object] | None] = []
        self._lock = threading.RLock()
        self._moving = moving_rope(self.loaded.model)
        self._weights = self._addresses()
        self._before: dict[str, Any] = {}
        self._calls = threading.local()
        self._engine: LedEngine | None = None
        with self._computing():
            self._engine = LedEngine(EngineConfig(self.loaded.name, retrieval_head, config, **options), self.loaded)
        self._watch(False)

    @property
    def engine(self) -> LedEngine:
        assert self._engine is not None
        return self._engine

    def put_on(self, model: PreTrainedModel) -> None:
        """Replace the model's functions."""
        kinds = {
            "forward": _Forward,
            "generate": _Generate,
            "_prepare_cache_for_generation": _PrepareCache,
            "load_custom_generate": _Refused,
            "init_continuous_batching": _Refused,
        }
        for name, kind in kinds.items():
            if name in vars(model):
                self._before[name] = vars(model)[name]
            setattr(model, name, kind(self, model, name))
        setattr(model, ENABLED, self)

    def take_off(self, model: PreTrainedModel) -> None:
        """Put the model's own functions back, and close the engine."""
        for name, own in list(vars(model).items()):
            if isinstance(own, _Replaced) and own.enabled is self:
                del vars(model)[name]
                if name in self._before:
                    vars(model)[name] = self._before[name]
        vars(model).pop(ENABLED, None)
        with self._lock:
            self.engine.close()
        forget_running(self.loaded.model)

    @property
    def closed(self) -> bool:
        return self.engine.closed

    def before(self, name: str, model: PreTrainedModel) -> Any:
        """A function of the model as it was."""
        return self._before.get(name) or getattr(type(model), name).__get__(model)

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
        if torch.is_autocast_enabled(self.loaded.model.device.type):
            raise RequestError("autocast changes number formats inside the model: load it in that format (dtype) instead")
        with self._lock, self._computing():
            logits = cache.advance(*given)
        output: dict[str, Any] = {"logits": logits[:, None], CACHE: cache}
        return CausalLMOutputWithPast(**output)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inside, the model's layers are the engine's."""
        with attention_of(self.loaded.model, ATTENTION_NAME), fixed_rope(self._moving):
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


class _Replaced:
    """Stands at a model in place of one of its functions."""

    def __init__(self, enabled: Enabled, model: PreTrainedModel, name: str) -> None:
        self.enabled, self.name, self._model = enabled, name, weakref.ref(model)
        self.__signature__ = inspect.signature(enabled.before(name, model))

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.enabled.before(self.name, self.model)
        return own(*args, **kwargs) if self.enabled.closed else self.call(own, *args, **kwargs)

    def call(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        """What is done while the model is enabled; `own` is the function as it was."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._model()))
        return self if copied is None else types.MethodType(getattr(type(copied), self.name), copied)


class _Forward(_Replaced):
    def call(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(kwargs.get(name), EngineCache) for name in CACHES):
            return own(*args, **kwargs)
        [cache] = (kwargs.pop(name) for name in CACHES if kwargs.get(name) is not None)
        named = inspect.signature(own).bind_partial(*args).arguments if args else {}
        return self.enabled.advance(cache, dict(named) | kwargs)


class _Generate(_Replaced):
    def call(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            raise RequestError("the model is in training mode, in which attention may drop out: call model.eval() first")
        if kwargs.get("negative_prompt_ids") is not None:
            raise RequestError(f"negative_prompt_ids goes through the model without the method: leave it out; {INSTEAD}")
        with self.enabled.calling():
            return own(*args, **kwargs)


class _PrepareCache(_Replaced):
    def call(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own).bind(*args, **kwargs).arguments
        config, model_kwargs, mode = (given[name] for name in ("generation_config", "model_kwargs", "generation_mode"))
        if why := _obstacle(config, model_kwargs, mode):
            raise RequestError(f"{why}; what works is {INSTEAD}, or specontext.disable(model)")
        model_kwargs[CACHE] = self.enabled.new_cache(config)


class _Refused(_Replaced):
    def call(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        what = "generation code of others" if self.name == "load_custom_generate" else "the library's continuous batching"
        raise RequestError(f"{what} goes past the engine; what works is {INSTEAD}, or specontext.disable(model)")


def _obstacle(config: GenerationConfig, model_kwargs: Mapping[str, Any], mode: GenerationMode) -> str | None:
    """Why generate() cannot do what it is asked for on an engine; None where it can."""
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or getattr(config, "is_assistant", False):
        name = "assisted generation" if getattr(config, "is_assistant", False) else mode.value.replace("_", " ")
        return f"{name} takes back or copies what was computed, which an engine does not do"
    if any(model_kwargs.get(name) is not None for name in CACHES):
        return f"the engine keeps KV itself: leave {CACHE} out (enable_prefix_caching=True keeps what is known of prompts)"
    if config.use_cache is False:
        return "without a cache (use_cache=False) nothing is left to choose from"
    if config.cache_implementation not in PLAIN_CACHES:
        return f"cache_implementation '{config.cache_implementation}' is the library's: see gpu_memory and host_memory"
    if config.output_attentions or config.output_hidden_states:
        return "attention and hidden states are not kept (output_attentions, output_hidden_states)"
    if config.guidance_scale not in (None, 1):
        return "guidance (guidance_scale) goes through the model without the method"
    config.prefill_chunk_size = None  # the engine cuts prompts itself (max_num_batched_tokens)
    return None
