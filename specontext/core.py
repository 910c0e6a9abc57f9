"""The nouns that rooms exchange: model shape, sampling parameters, requests, batches, selections and load plans.

Shapes use R requests, S tokens in context, L layers, Hq query heads, Hkv KV heads, G retrieval groups, D head dim, B budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from specontext.errors import ConfigError, RequestError

if TYPE_CHECKING:  # torch takes seconds to import, and only annotations here need it
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig


MOST_OUTPUTS = 1024  # of one prompt
MOST_STOPS = 64
LONGEST_STOP = 1 << 17  # characters; matching costs no more for a long one, but it is kept, and text may be held back for it
MOST_STOP_TOKENS = 1024
LONGEST_GRAMMAR = 1 << 18  # characters of a schema, a regular expression, a grammar or all choices
MOST_CHOICES = 4096
MOST_BIASED = 1024  # tokens with a bias, as many as OpenAI allows at least
MOST_BAD_WORDS = 1024
SCALE_BYTES = 2  # of a key or value in 8 bits
NOBODY_S_NUMBERS = 8  # of a key that no layer stores, see `ModelShape`: rows of whole words, which kernels copy
LONGEST_SHOWN = 80  # characters of a value that an error quotes


def shown(value: object) -> str:
    """A value as errors quote it: whatever was given, in a few words."""
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_SHOWN:  # Python refuses to write very large ones out
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes | list | tuple) and len(value) > LONGEST_SHOWN:
        head = repr(value[: LONGEST_SHOWN // 2]) if isinstance(value, str | bytes) else type(value).__name__
        return f"{head} ({len(value)} {'characters' if isinstance(value, str) else 'items'} in all)"
    text = repr(value)
    return text if len(text) <= 2 * LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ..."


@dataclass(frozen=True)
class Window:
    """What a token attends to in a layer that does not read the whole context.

    Attributes:
        size: the last so many tokens, itself among them; or tokens of a chunk.
        chunked: the context is cut into chunks of this size, and a token reads those of its own chunk up to itself.
    """

    size: int
    chunked: bool = False

    def first(self, position: Any) -> Any:
        """The first token that the one at `position` reads, perhaps below 0; both numbers, or tensors of them."""
        return position // self.size * self.size if self.chunked else position - (self.size - 1)


@dataclass(frozen=True)
class StateTensor:
    """Numbers of fixed size that a layer keeps of all tokens of a request instead of their KV, or beside it.

    Attributes:
        mixer: the module that keeps them, numbered among those that keep any: linear attention, a state-space model, a short
            convolution.
        recurrent: a state that every token changes; else the last inputs of a convolution.
        index: which of the module's states of this kind.
        shape: of one request's.
    """

    mixer: int
    recurrent: bool
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LatentSizes:
    """What keys and values are made of where attention is multi-head latent attention.

    All that is stored of a token in a layer is one row: the latent, of which keys and values of all heads are linear maps, and
    the numbers of the keys that RoPE turns, which all heads share.

    Attributes:
        rank: numbers of the latent (kv_lora_rank).
        rotated: numbers that RoPE turns (qk_rope_head_dim).
        key, value: of a head's key, those that RoPE turns among them, and of its value, once they are made.
    """

    rank: int
    rotated: int
    key: int
    value: int

    @property
    def row(self) -> int:
        """Numbers of a row."""
        return self.rank + self.rotated


@dataclass(frozen=True)
class ModelShape:
    """What KV storage, planner and selectors must know of a model.

    Layers are those that attend to the whole context, numbered among themselves: their KV grows, is selected from, and moves.
    Layers with a window keep the tokens of their window, and those without attention a state of fixed size; both take no part in
    any of that. Where all layers with attention have a window, a layer is counted that nobody attends to, with rows of a few
    bytes: its pages are what an engine knows a context's length by.

    Attributes:
        dtype: number format of weights, and of KV unless `kv_dtype` names another.
        max_position: longest context that is served, in tokens: what the checkpoint was made for, as far as attention here
            computes it.
        limited_by: the entry of the config that keeps `max_position` below what the checkpoint was made for, in words; '' for
            none.
        longer: the longest context that may be asked for, where it is more than `max_position`: RoPE has other angles then, for
            contexts of all lengths. 0 where it is not.
        windows: of every layer of the decoder with attention its window, None for one that attends to the whole context; empty
            where none has a window.
        window_heads: KV heads of the layers with a window, and the width of all heads there; None where they are as elsewhere.
        kv_dtype: of the codes of KV in 8 bits, each key and value with a scale; None for numbers of `dtype`.
        inattentive: numbers in the decoder of the layers that have no attention, ascending.
        states: what layers keep of each request in a fixed size, once that has been measured (`memory.states`).
        host_kv_dtype: the same of the host's rows, where they alone are in 8 bits; None for rows like those of the device.
        latent: where what is stored are latents. Attention is then to one KV head, a row of which is both key and value, and D
            the numbers of a row. None for keys and values.
    """

    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    dtype: torch.dtype
    limited_by: str = ""
    windows: tuple[Window | None, ...] = ()
    window_heads: tuple[int, int] | None = None
    longer: int = 0
    kv_dtype: torch.dtype | None = None
    inattentive: tuple[int, ...] = ()
    states: tuple[StateTensor, ...] = ()
    host_kv_dtype: torch.dtype | None = None
    latent: LatentSizes | None = None

    @classmethod
    def from_config(cls, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> ModelShape:
        """The shape of a decoder, from its config alone.

        Args:
            dtype: by default the config's own, float32 where it names none.

        Raises:
            AttributeError: an entry that is missing, or heads that differ from layer to layer.
        """
        max_position, limited_by, longer = _longest_context(config)
        windows, inattentive = _windows(config, max(max_position, longer)), _inattentive(config)
        attentive = [layer for layer in range(config.num_hidden_layers) if layer not in inattentive]
        latent = _latent(config)
        if dtype is None:
            import torch

            dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        near = [layer for layer, window in zip(attentive, windows, strict=False) if window is not None]
        kv_heads, head_dim = heads = _heads(config, [layer for layer in attentive if layer not in near] or near)
        near_heads = _heads(config, near) if near else heads
        return cls(
            layers=max(1, windows.count(None)) if windows else len(attentive),
            hidden_size=config.hidden_size,
            query_heads=config.num_attention_heads,
            kv_heads=1 if latent else kv_heads,
            head_dim=latent.row if latent else head_dim,
            vocab_size=config.vocab_size,
            max_position=max_position,
            dtype=dtype,
            limited_by=limited_by,
            windows=windows,
            window_heads=near_heads if near_heads != heads else None,
            longer=longer,
            inattentive=inattentive,
            latent=latent,
        )

    def check_kv_format(self, setting: str) -> None:
        """Raises ConfigError, which names a setting and its value, where rows of these heads cannot be codes with scales."""
        if self.latent is not None:
            raise ConfigError(f"{setting} does not work with multi-head latent attention: set it to auto")
        if self.head_dim % 2:
            raise ConfigError(f"{setting} needs heads of an even width, not of {self.head_dim}: set it to auto")

    @property
    def only_windows(self) -> bool:
        """Whether all layers have a window, so that nothing grows with a context and there is nothing to select from."""
        return bool(self.windows) and None not in self.windows

    @property
    def reach(self) -> int:
        """The longest context that may be asked for, in tokens."""
        return max(self.max_position, self.longer)

    @property
    def depth(self) -> int:
        """Layers of the decoder, whatever they attend to."""
        return (len(self.windows) or self.layers) + len(self.inattentive)

    @property
    def attentive(self) -> tuple[int, ...]:
        """Numbers in the decoder of the layers that have attention."""
        return tuple(layer for layer in range(self.depth) if layer not in self.inattentive)

    @property
    def state_bytes(self) -> int:
        """Bytes of a request's states, in all layers that keep one."""
        return sum(state.num_bytes for state in self.states)

    @property
    def windowed(self) -> tuple[Window, ...]:
        """The windows of the layers that have one."""
        return tuple(window for window in self.windows if window is not None)

    @property
    def full(self) -> tuple[int, ...]:
        """Numbers in the decoder of the layers that attend to the whole context."""
        windows = self.windows or (None,) * self.layers
        return tuple(layer for layer, window in zip(self.attentive, windows, strict=True) if window is None)

    @property
    def longest(self) -> str:
        """`max_position` in words, with what limits it."""
        asked = f"{self.longer} where max_model_len asks for them" if self.longer else ""
        why = ", ".join(filter(None, (self.limited_by, asked)))
        return f"{self.max_position} tokens" + (f" ({why})" if why else "")

    @property
    def row_numbers(self) -> int:
        """Numbers of K and V of one token of one KV head of one layer: of a latent, which is both, they count once."""
        return self.part_numbers if self.latent is not None else 2 * self.part_numbers

    @property
    def part_numbers(self) -> int:
        """Numbers of a key, a value or a latent in pages."""
        return NOBODY_S_NUMBERS if self.only_windows else self.head_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token of one KV head of one layer, with their scales."""
        if self.kv_dtype is not None:
            return 2 * (self.part_numbers * self.kv_dtype.itemsize + SCALE_BYTES)
        return self.row_numbers * self.dtype.itemsize

    @property
    def key_dim(self) -> int:
        """Numbers of a head's key as the model makes it: D but for latents."""
        return self.latent.key if self.latent is not None else self.head_dim

    @property
    def made_dim(self) -> int:
        """Numbers of a head's key and value on average, as the model makes them: D but for latents."""
        return (self.latent.key + self.latent.value) // 2 if self.latent is not None else self.head_dim

    @property
    def on_host(self) -> ModelShape:
        """The same with the rows that the host has."""
        return self if self.host_kv_dtype is None else replace(self, kv_dtype=self.host_kv_dtype, host_kv_dtype=None)

    @property
    def window_token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer with a window, whose KV is never in 8 bits."""
        kv_heads, head_dim = self.window_heads or (self.kv_heads, self.head_dim)
        return 2 * kv_heads * head_dim * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers and KV heads; 0 where all layers have a window."""
        return 0 if self.only_windows else self.layers * self.kv_heads * self.row_bytes


# Entries of configs that name the longest context in tokens, besides max_position_embeddings.
LENGTHS = (
    *("n_ctx", "n_positions", "seq_len", "seq_length", "sequence_length", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *(
        "model_max_length",
        "tokenizer_model_max_length",
        "max_model_len",
        "context_length",
        "max_context_length",
        "max_target_positions",
    ),
)


FAR = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}  # of layers without a window
WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}  # entries, and layers with them


def _longest_context(config: PreTrainedConfig) -> tuple[int, str, int]:
    """`max_position`, `limited_by` and `longer` of a decoder.

    Linear and YaRN scaling serve the original length times their factor, also where max_position_embeddings is still the original
    length. A window that the config's class does not know serves contexts of its own size, in which it leaves nothing out.
    RoPE of type longrope serves its original length, in which the library has one set of angles for all contexts, and dynamic
    RoPE max_position_embeddings; where more is asked for, all requests have the angles of that length.
    """
    stated = _tokens(config, "max_position_embeddings")
    named = {name: tokens for name in LENGTHS if (tokens := _tokens(config, name)) is not None}
    if stated is None and not named:
        raise AttributeError("its config does not name its longest context (max_position_embeddings)")
    base = stated or min(named.values())
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    said = _tokens(config, "original_max_position_embeddings")  # beside RoPE's own entries it has precedence in the library
    original = said or rope.get("original_max_position_embeddings") or base
    longest, factor = base, rope.get("factor")
    if (rope.get("rope_type") or rope.get("type")) in ("linear", "yarn") and isinstance(factor, int | float):
        longest = max(base, int(original * factor))
    if config.model_type.startswith("cohere"):  # the length that Command R's model card promises
        longest = max(longest, named.get("model_max_length", 0))
    limits = {f"{name} {tokens} in its config": tokens for name, tokens in named.items() if tokens not in (base, original)}
    turning, longer = {}, longest
    for part in ropes:
        if part.get("rope_type") == "longrope":
            tokens = said or part.get("original_max_position_embeddings") or base
            turning[f"original_max_position_embeddings {tokens}, beyond which RoPE of type longrope has other angles"] = tokens
        if part.get("rope_type") == "dynamic" and isinstance(part.get("factor"), int | float):
            longer = max(longer, int(base * part["factor"]))
    for entry, kind in WINDOWS.items():
        tokens, kinds = _tokens(config, entry), layer_kinds(config)
        used = getattr(config, "use_sliding_window", True) is not False or kind != "sliding_attention"
        if tokens is not None and used and not kinds and not (_declares(config, entry) and kind == "sliding_attention"):
            limits[f"{entry} {tokens} in its config, which its class does not compute"] = tokens
    dual = getattr(config, "dual_chunk_attention_config", None)
    if isinstance(dual, dict) and isinstance(dual.get("chunk_size"), int):
        tokens = dual["chunk_size"] - (dual.get("local_size") or 0)
        limits[f"dual_chunk_attention_config in its config, which has no effect on up to {tokens} tokens"] = tokens
    longer = min(longer, *limits.values()) if limits else longer
    limits |= turning
    least = min(limits, key=lambda words: limits[words], default="")
    found, why = (limits[least], least) if least and limits[least] < longest else (longest, "")
    return found, why, longer if longer > found else 0


def layer_kinds(config: PreTrainedConfig) -> list[str] | None:
    """What kind of attention each layer has, where the config's class knows of such kinds."""
    own = _declares(config, "layer_types") or "layer_types" in config.attribute_map or hasattr(type(config), "layer_types")
    kinds = getattr(config, "layer_types", None) if own else None  # else the class ignores them
    return None if kinds is None else [FORMER_NAMES.get(kind, kind) for kind in kinds]


def _declares(config: PreTrainedConfig, entry: str) -> bool:
    """Whether a config's class knows an entry; others are stored and ignored."""
    return not is_dataclass(config) or entry in {known.name for known in fields(config)}


FORMER_NAMES = {"attention": "full_attention", "mamba": "linear_attention"}
# Kinds of layers without attention: what keeps a state, and what has a feed-forward alone. A "hybrid" has a state and attention.
STATEFUL = ("linear_attention", "conv")
INATTENTIVE = (*STATEFUL, "moe", "mlp")


def _inattentive(config: PreTrainedConfig) -> tuple[int, ...]:
    """Numbers of the layers of a decoder that have no attention."""
    kinds = layer_kinds(config) or []
    return tuple(layer for layer, kind in enumerate(kinds[: config.num_hidden_layers]) if kind in INATTENTIVE)


def _windows(config: PreTrainedConfig, longest: int) -> tuple[Window | None, ...]:
    """Windows of all layers of a decoder with attention; those as long as the context are none."""
    kinds = layer_kinds(config)
    if not kinds:
        windowed = _declares(config, "sliding_window") and getattr(config, "use_sliding_window", True) is not False
        kinds = ["sliding_attention"] * config.num_hidden_layers if windowed else []
    sizes = {kind: _tokens(config, entry) for entry, kind in WINDOWS.items()}
    found: list[Window | None] = []
    for kind in kinds[: config.num_hidden_layers]:
        if kind in INATTENTIVE:
            continue
        size = sizes.get(kind)
        found.append(Window(size, kind == "chunked_attention") if size is not None and size < longest else None)
    return tuple(found) if any(found) else ()


def _heads(config: PreTrainedConfig, layers: Sequence[int]) -> tuple[int, int]:
    """KV heads of some layers, and the width of all their heads; raises AttributeError where these layers differ."""
    queries = of_layers(config, "num_attention_heads", range(config.num_hidden_layers))
    kv_heads = of_layers(config, "num_key_value_heads", layers) or queries
    return kv_heads, of_layers(config, "head_dim", layers) or config.hidden_size // queries


def of_layers(config: PreTrainedConfig, entry: str, layers: Sequence[int]) -> Any:
    """An entry's value where it is the same in these layers; None where there is none."""
    if entry not in (getattr(config, "per_layer_attributes", None) or ()):
        kinds = layer_kinds(config) or []
        if layers and {kind for layer, kind in enumerate(kinds) if layer in layers} == {"full_attention"}:
            other = getattr(config, FAR.get(entry, entry), None)  # of Gemma 4 in older versions of the library
            if other and (entry == "head_dim" or getattr(config, "attention_k_eq_v", False)):
                return other
        return getattr(config, entry) if entry == "num_attention_heads" else getattr(config, entry, None)
    found = sorted({getattr(config.per_layer_config[layer], entry) for layer in layers})
    if len(found) > 1:
        raise AttributeError(f"its layers differ in {entry} ({', '.join(map(str, found))}), and KV here has rows of one width")
    return found[0]


def _latent(config: PreTrainedConfig) -> LatentSizes | None:
    """Sizes of multi-head latent attention; None for any other."""
    rank = getattr(config, "kv_lora_rank", None)
    if not rank:
        return None
    rotated = config.qk_rope_head_dim
    return LatentSizes(rank, rotated, config.qk_nope_head_dim + rotated, config.v_head_dim)


def _tokens(config: PreTrainedConfig, name: str) -> int | None:
    """A number of tokens above 0 that an entry of a config names."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


@dataclass(frozen=True)
class Thinking:
    """How an output's thinking is told from the answer after it.

    Attributes:
        inside: the output begins with thinking, although no mark says so.
        begin, end: the marks around it.
        begin_id, end_id: their tokens, where each is a single one. Then no other token is taken for the mark, whatever its text.
    """

    inside: bool
    begin: str = "<think>"
    end: str = "</think>"
    begin_id: int | None = None
    end_id: int | None = None


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an output must look like, one of these; names and meanings as in vLLM.

    Attributes:
        json: a JSON schema, as a text or an object; kept as a text.
        regex: a regular expression that the whole output matches.
        choice: the output is one of these texts.
        grammar: a context-free grammar, in GBNF (EBNF of llama.cpp) or Lark.
        json_object: the output is any JSON object.
        disable_any_whitespace: no white space between the values of JSON; else as much as a readable layout needs.
        whitespace_pattern: a regular expression of the white space between them.

    Raises:
        RequestError: none or several of them, or one that is no such thing or too large.
    """

    json: str | Mapping[str, object] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar")
        given = [name for name in kinds if getattr(self, name) is not None] + (["json_object"] if self.json_object else [])
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs must name one of {', '.join((*kinds, 'json_object'))}, got {' and '.join(given) or 'none'}"
            )
        if self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", _json_text(self.json))
        if self.choice is not None:
            texts = () if isinstance(self.choice, str) or not isinstance(self.choice, Iterable) else tuple(self.choice)
            if not 0 < len(texts) <= MOST_CHOICES or not all(isinstance(text, str) and text for text in texts):
                raise RequestError(f"structured_outputs.choice must be a list of 1 to {MOST_CHOICES} texts that are not empty")
            object.__setattr__(self, "choice", texts)
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(f"structured_outputs.{name} must be a text that is not empty, got {shown(value)}")
            if isinstance(value, str) and _is_half(value):
                raise RequestError(f"structured_outputs.{name} must be Unicode: it has half a character")
        if any(map(_is_half, self.choice or ())):
            raise RequestError("structured_outputs.choice must be Unicode: one of them has half a character")
        size = sum(len(getattr(self, name) or "") for name in ("json", "regex", "grammar")) + sum(map(len, self.choice or ()))
        if size > LONGEST_GRAMMAR:
            raise RequestError(f"structured_outputs must be of at most {LONGEST_GRAMMAR} characters, got {size}: make it smaller")


def _json_text(schema: object) -> str:
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"structured_outputs.json must be a JSON schema, an object or its text, got {shown(schema)}")
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is not JSON: {error}") from error


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled and when it ends; names and meanings as in vLLM.

    Attributes:
        n: outputs for each prompt, `MOST_OUTPUTS` at most.
        temperature: 0 is greedy.
        top_p, top_k, min_p: restrictions of the candidates; top_k 0 or -1 is no restriction.
        seed: random numbers depend on (seed, output index, position) only. None takes one that is drawn from the engine's,
            another for every sampled request; so does -1.
        stop: strings that end the output; they are cut off unless `include_stop_str_in_output`. `MOST_STOPS` at most, of
            `LONGEST_STOP` characters at most.
        stop_token_ids: tokens that end the output, beside the model's end tokens; `MOST_STOP_TOKENS` at most.
        ignore_eos: go on after the model's end tokens.
        max_tokens, min_tokens: bounds of the output in tokens.
        logprobs: number of most likely tokens to report at every position, beside the chosen one; None reports nothing, and no
            more are reported than the model has.
        prompt_logprobs: the same for the tokens of the prompt.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens of the output so far.
        repetition_penalty: divides positive (multiplies negative) logits of tokens of prompt and output.
        method, budget: how KV entries are chosen for this request, among what the engine allows; None is the engine's own. What
            others in the batch chose makes no difference.
        thinking: tell the output's thinking from its answer; the text is then the answer alone, where stop strings count.
        structured_outputs: what the output must look like, after its thinking if that is told apart; a mapping becomes
            `StructuredOutputsParams`. An output that can only end is ended, with or without an end token.
        logit_bias: numbers from -100 to 100 that are added to the logits of tokens, by id; kept as pairs.
        allowed_token_ids: the only tokens that may be chosen; None allows all.
        bad_words: texts that are not written where they begin with a token of their own.

    Raises:
        RequestError: a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    method: str | None = None
    budget: int | None = None
    thinking: Thinking | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, object] | None = None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()

    @cached_property
    def plain(self) -> bool:
        """Whether the most likely token is taken as it is, and nothing else is reported."""
        return self.temperature == 0 and self.unrestricted

    @cached_property
    def unrestricted(self) -> bool:
        """Whether tokens are chosen by the logits alone, whatever came before, and nothing else is reported."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        free = self.structured_outputs is None and self.allowed_token_ids is None and not self.logit_bias and not self.bad_words
        return free and not penalties and not self.min_tokens and self.logprobs is None

    def __post_init__(self) -> None:
        self._as_tuple("stop", MOST_STOPS)
        self._as_tuple("bad_words", MOST_BAD_WORDS)
        self._as_tuple("stop_token_ids", MOST_STOP_TOKENS)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._bounds("n", 1, MOST_OUTPUTS)
        self._bounds("temperature", 0.0, math.inf)
        self._bounds("top_p", 0.0, 1.0, above=True)
        self._bounds("top_k", 0, math.inf)
        self._bounds("min_p", 0.0, 1.0)
        self._bounds("max_tokens", 1, math.inf)
        self._bounds("min_tokens", 0, self.max_tokens)
        self._bounds("presence_penalty", -2.0, 2.0)
        self._bounds("frequency_penalty", -2.0, 2.0)
        self._bounds("repetition_penalty", 0.0, math.inf, above=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._bounds(name, 0, math.inf)
        if self.seed is not None:
            self._bounds("seed", -(2**63), 2**63 - 1)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        if self.budget is not None:
            self._bounds("budget", 1, math.inf)
        if self.method is not None and not isinstance(self.method, str):
            raise RequestError(f"method must be a name, got {shown(self.method)}")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("stop must be non-empty strings")
        if (longest := max(map(len, self.stop), default=0)) > LONGEST_STOP:
            raise RequestError(f"stop must be strings of at most {LONGEST_STOP} characters, got one of {longest}")
        if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in self.stop_token_ids):
            raise RequestError("stop_token_ids must be token ids, integers from 0 up")
        if any(not isinstance(text, str) or not text.strip() for text in self.bad_words):
            raise RequestError("bad_words must be texts that are not blank")
        if any(map(_is_half, self.bad_words)):
            raise RequestError("bad_words must be Unicode: one of them has half a character")
        self._kinds()
        self._token_rules()
        if isinstance(self.structured_outputs, Mapping):
            known = {f.name for f in fields(StructuredOutputsParams)}
            if unknown := sorted(str(name) for name in set(self.structured_outputs) - known):
                raise RequestError(f"structured_outputs must have no field {unknown[0]}: it knows {', '.join(sorted(known))}")
            made = StructuredOutputsParams(**self.structured_outputs)  # type: ignore[arg-type]
            object.__setattr__(self, "structured_outputs", made)
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise RequestError(f"structured_outputs must be StructuredOutputsParams, got {shown(self.structured_outputs)}")

    def _kinds(self) -> None:
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        if self.thinking is not None and not isinstance(self.thinking, Thinking):
            raise RequestError(f"thinking must be a Thinking, which says what marks it, got {shown(self.thinking)}")

    def _token_rules(self) -> None:
        if self.logit_bias is not None:
            pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
            table = tuple(pairs) if isinstance(pairs, Iterable) else (None,)
            if len(table) > MOST_BIASED or not all(map(_is_biased, table)):
                raise RequestError(f"logit_bias must map at most {MOST_BIASED} token ids to numbers from -100 to 100")
            object.__setattr__(self, "logit_bias", table or None)
        if self.allowed_token_ids is not None:
            if not isinstance(self.allowed_token_ids, Iterable):
                raise RequestError(f"allowed_token_ids must be a list, got {shown(self.allowed_token_ids)}")
            ids = tuple(self.allowed_token_ids)
            if not ids or not all(map(_is_id, ids)):
                raise RequestError("allowed_token_ids must be one or more token ids, integers from 0 up")
            object.__setattr__(self, "allowed_token_ids", ids)

    def _as_tuple(self, name: str, most: int) -> None:
        value = getattr(self, name)
        if value is None or isinstance(value, str):
            value = () if value is None else (value,)
        elif not isinstance(value, Iterable):
            raise RequestError(f"{name} must be a list, got {shown(value)}")
        items = tuple(islice(value, most + 1))
        if len(items) > most:
            raise RequestError(
                f"{name} must be a list of at most {most}, got {len(value) if isinstance(value, Sized) else 'more'}"
            )
        object.__setattr__(self, name, items)

    def _bounds(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        whole = {f.name: f.type for f in fields(self)}[name].startswith("int")
        number = isinstance(value, int) if whole else isinstance(value, int | float)
        if isinstance(value, bool) or not number or not low <= value <= high or value >= 2**63 or (above and value == low):
            kind = "an integer" if whole else "a number"
            least = "above" if above else "of at least"
            most = f" and at most {high}" if not math.isinf(high) else " and below 2**63" if number and value >= 2**63 else ""
            raise RequestError(f"{name} must be {kind} {least} {low}{most}, got {shown(value)}")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_biased(pair: object) -> bool:
    """Whether this is a token id and a number to add to its logit."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return False
    bias = pair[1]
    return _is_id(pair[0]) and isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100


def _is_half(text: str) -> bool:
    """Whether a text has half a character, which no tokenizer and no grammar takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


@dataclass(frozen=True)
class Choice:
    """How the KV entries of a request are chosen: a method's name, and its budget (0 for a method that reads everything)."""

    method: str
    budget: int


class AllowedTokens(NamedTuple):
    """What a grammar allows next: row `row` of the masks of a step, int32 [outputs that follow a grammar, words] on the device.

    Bit t % 32 of word t // 32 says whether token t may come.
    """

    masks: Tensor
    row: int


@dataclass(eq=False)
class Request:
    """One output being made: its tokens, how many of them the model has seen, and its seat in the KV tables.

    `computed <= len(token_ids) + unread`: tokens catch up; a request whose prompt is computed decodes one token a step.

    Attributes:
        choice: how its KV entries are chosen; None is the engine's own way.
        index: which of the `n` outputs of its prompt this is; part of the key of its random numbers.
        seat: row of this request in every per-request table, -1 while it waits.
        room: tokens for which its seat has pages; 0 while it waits.
        prefill_length: tokens that are computed densely: the prompt, and what had been generated before a restart.
        arrived, admitted_at: `time.perf_counter()` when it came, and when it got its first seat.
        preemptions: how often it had to wait again.
        captured_steps: decode steps that were replayed as a captured CUDA graph.
        cached_tokens: tokens whose KV was known when it first got a seat; None before.
        history: what the sampler remembers of the tokens, for penalties.
        allowed: what a grammar allows next; None allows all. Valid in one step.
        banned: sequences of tokens of which the last one may not follow the others.
        unread: tokens behind `token_ids` that the device has chosen and the host does not know yet.
        waiting_since: `time.perf_counter()` when it came, or when it had to wait again.
        waited_for: why it had to wait, what holds it last.
        urgent: it has waited as long as users allow, so layers leave for it.
        set_back: how many requests had ended when it was made to wait for the sake of tokens a second; None where it was not.
        let_in: the same of when layers began to leave for it.
        held: its next token is not known yet, since it is chosen elsewhere: no step takes it, and it is the first to make room.
        prompt_logprobs: for each prompt token the log-probabilities by token id, None for the first one; it grows while the
            prompt is computed and is complete before the first token is sampled.
    """

    request_id: str
    token_ids: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    choice: Choice | None = None
    index: int = 0
    seat: int = -1
    room: int = 0
    computed: int = 0
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    arrived: float = 0.0
    admitted_at: float | None = None
    prefill_length: int = 0
    preemptions: int = 0
    captured_steps: int = 0
    cached_tokens: int | None = None
    history: object = None
    allowed: AllowedTokens | None = None
    banned: Sequence[Sequence[int]] = ()
    unread: int = 0
    held: bool = False
    waiting_since: float = 0.0
    waited_for: list[str] = field(default_factory=list)
    urgent: bool = False
    set_back: int | None = None
    let_in: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.prompt_length <= len(self.token_ids):
            raise RequestError("a request needs at least one prompt token")
        self.prefill_length = self.prefill_length or self.prompt_length

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def decoding(self) -> bool:
        """Whether the next step takes one generated token (else a chunk of the prompt)."""
        return self.computed >= self.prefill_length

    def restart(self) -> None:
        """Forget what was computed: all tokens so far are computed again, densely, like a prompt."""
        self.computed, self.prefill_length = 0, len(self.token_ids)


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one request inside a packed batch: positions start .. start + length - 1."""

    seat: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Lane:
    """Decode tokens start .. stop - 1 of a batch, whose requests choose in the same way.

    Attributes:
        span: none of them has more tokens in context.
    """

    choice: Choice | None
    start: int
    stop: int
    span: int


@dataclass(frozen=True)
class Batch:
    """The packed tokens of one step: decode tokens first (one a request), then prefill chunks.

    Attributes:
        token_ids, positions, seats: int64 [T] on the device; a negative position is padding.
        lengths: int64 [T], tokens in context of the token's request once this step is stored.
        seeds: int64 [R], of the decoding requests.
        num_decodes: R, how many of the first tokens are decode tokens.
        prefills: chunks of prompts, after the decode tokens.
        last_tokens: int64 [requests], packed index of every request's last token.
        span: no decoding request has more tokens in context. The host knows it, so nothing has to ask the device.
        lanes: the decode tokens by how their requests choose; where none are given, all choose in the engine's own way.
    """

    token_ids: Tensor
    positions: Tensor
    seats: Tensor
    lengths: Tensor
    seeds: Tensor
    num_decodes: int
    prefills: tuple[Segment, ...]
    last_tokens: Tensor
    span: int
    lanes: tuple[Lane, ...] = ()

    def __post_init__(self) -> None:
        total = self.num_decodes + sum(segment.length for segment in self.prefills)
        assert self.token_ids.shape == self.positions.shape == self.seats.shape == self.lengths.shape == (total,)
        assert len(self.last_tokens) == self.num_decodes + len(self.prefills)
        assert self.seeds.shape == (self.num_decodes,)
        expected = self.num_decodes
        for segment in self.prefills:
            assert segment.offset == expected and segment.length > 0
            expected += segment.length
        if self.num_decodes and not self.lanes:
            object.__setattr__(self, "lanes", (Lane(None, 0, self.num_decodes, self.span),))
        assert [lane.start for lane in self.lanes] == [0, *(lane.stop for lane in self.lanes)][: len(self.lanes)]
        assert not self.num_decodes or self.lanes[-1].stop == self.num_decodes


@dataclass(frozen=True)
class Selection:
    """KV entries that attention may read in one decode step.

    Attributes:
        tokens: int64 [R, G, B] token positions: sinks, scored tokens, recent tokens, each part ascending and then padded with -1,
            which is no entry.
        scored: bool [R, G, B], the entries that were chosen by a score (neither sink nor recent).
    """

    tokens: Tensor
    scored: Tensor

    def __post_init__(self) -> None:
        assert self.tokens.dim() == 3 and self.tokens.shape == self.scored.shape


@dataclass(frozen=True)
class SlotPlan:
    """What one selection moves, the same for every offloaded layer that reads it.

    Attributes:
        slots: int64 [R, G, B], the device slot of every selected entry, -1 for padding.
        missing: bool [R, G, B], entries that must be copied from the host into their slot.
    """

    slots: Tensor
    missing: Tensor


@dataclass
class CompletionOutput:
    """One generated output.

    Attributes:
        finish_reason: "stop" (end token or stop string) or "length"; None while it streams.
        logprobs: for each token the log-probabilities by token id: the chosen token and the most likely ones.
        reasoning: the thinking before the text, where `SamplingParams.thinking` tells it apart.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, float]] | None = None
    stats: dict[str, object] = field(default_factory=dict)
    reasoning: str = ""


@dataclass
class RequestOutput:
    """What `LLM.generate` returns for one prompt; `text`, `token_ids`, `finish_reason` and `stats` are the first output's.

    Attributes:
        prompt_logprobs: for each prompt token the log-probabilities by token id: the token itself and the most likely ones. None
            for the first token, before which there is nothing.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, float] | None] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stats(self) -> dict[str, object]:
        return self.outputs[0].stats
