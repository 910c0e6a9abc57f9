"""How an output is chosen and when it ends: what a request may ask for, with bounds for whatever costs time or memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice

from specontext.errors import RequestError, shown

MOST_OUTPUTS = 1024  # of one prompt
NO_BOUND = 2**63 - 1
MOST_STOPS = 64
LONGEST_STOP = 1 << 17  # characters; matching costs no more for a long one, but it is kept, and text may be held back for it
MOST_STOP_TOKENS = 1024
LONGEST_GRAMMAR = 1 << 18  # characters of a schema, a regular expression, a grammar or all choices
MOST_CHOICES = 4096
MOST_BIASED = 1024  # tokens with a bias, as many as OpenAI allows at least
MOST_BAD_WORDS = 1024


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
        max_tokens, min_tokens: bounds of the output in tokens; None is as many as the context has room for.
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
    max_tokens: int | None = 16
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
    def most_tokens(self) -> int:
        """Tokens of the output at most, as far as this says."""
        return NO_BOUND if self.max_tokens is None else self.max_tokens

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
        if self.max_tokens is not None:
            self._bounds("max_tokens", 1, math.inf)
        self._bounds("min_tokens", 0, math.inf if self.max_tokens is None else self.max_tokens)
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
        for name in ("stop", "bad_words"):
            if any(map(_is_half, getattr(self, name))):
                raise RequestError(f"{name} must be Unicode: one of them has half a character")
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
