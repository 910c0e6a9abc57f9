"""`enable` has a Hugging Face model's own generate() choose among logits that an engine computes; `disable` restores it.

generate() stays what it is: it prepares inputs, processes logits, chooses tokens, streams them and stops. In place of a cache it
holds the rows of its call (`EngineCache`), and a forward pass with these is a step of the engine. Everything is done to one
model object: five of its attributes, and what `attention_of` says while the engine computes. Any other use of the model, such as
a forward pass of its owner's, is what it was.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from specontext.config import EngineConfig, SpeContextConfig
from specontext.errors import ConfigError, ModelError, RequestError
from specontext.integrations.hf_cache import INSTEAD, EngineCache
from specontext.integrations.hf_engine import CACHE, Enabled
from specontext.models.attention import forget_running

ENABLED = "specontext_enabled"  # attribute of a model that is
CACHES = ("cache", "past_key_values", "cache_params")  # what versions of the library call it
PLAIN_CACHES = (None, "dynamic", "hybrid")  # values of cache_implementation that ask for nothing
NOT_HERE = frozenset(
    "model retrieval_head method dtype device methods seed load_format quantization tensor_parallel_size trust_remote_code "
    "revision".split()
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
            f"enable takes a model of transformers, got {type(model).__name__}: give a pipeline's .model, and of "
            "a model of peft what merge_and_unload() or get_base_model() returns"
        )
    disable(model)
    known = {f.name for f in fields(EngineConfig)} - NOT_HERE
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"unknown option {', '.join(unknown)}: enable takes {', '.join(sorted(known))}")
    if model.training:
        raise ModelError("the model is in training mode, in which attention may drop out: call model.eval() first")
    settings: dict[str, Any] = {"enable_prefix_caching": False, "methods": ()} | options
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        settings["enforce_eager"] = (
            True  # adapters are exchanged by what Python does in a pass, which a captured step does not repeat
        )
    try:
        enabled = Enabled(model, retrieval_head, config or SpeContextConfig(), settings)
    except BaseException:
        forget_running(model)
        raise
    for name, kind in REPLACED.items():
        setattr(model, name, kind(enabled, model, name))
    setattr(model, ENABLED, enabled)
    return enabled


def disable(model: PreTrainedModel) -> None:
    """Restore a model that was enabled, and free what its engine holds; another model is left as it is."""
    enabled = vars(model).get(ENABLED) if isinstance(model, PreTrainedModel) else None
    if not isinstance(enabled, Enabled):
        return
    for name in REPLACED:
        replaced = vars(model).get(name)
        if isinstance(replaced, _Replaced) and replaced.enabled is enabled:  # else somebody has replaced it since
            del vars(model)[name]
            if replaced.before is not None:
                vars(model)[name] = replaced.before
    del vars(model)[ENABLED]
    enabled.close()


class _Replaced:
    """Stands at a model in place of one of its functions.

    Attributes:
        before: what stood there and was not of the model's class.
    """

    def __init__(self, enabled: Enabled, model: PreTrainedModel, name: str) -> None:
        self.enabled, self.name, self._model = enabled, name, weakref.ref(model)
        self.before = vars(model).get(name)
        self.__signature__ = inspect.signature(self.own)

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None
        return model

    @property
    def own(self) -> Any:
        """The function as it was."""
        return self.before if self.before is not None else getattr(type(self.model), self.name).__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.own
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


REPLACED: dict[str, type[_Replaced]] = {
    "forward": _Forward,
    "generate": _Generate,
    "_prepare_cache_for_generation": _PrepareCache,
    "load_custom_generate": _Refused,
    "init_continuous_batching": _Refused,
}


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
