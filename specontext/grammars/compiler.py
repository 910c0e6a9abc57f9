"""From what a request asks for to a compiled grammar; each is compiled once, by whichever thread asks first."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from copy import copy
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from specontext.core import StructuredOutputsParams
from specontext.errors import RequestError
from specontext.grammars.grammar import Grammar

LARK_HEADER = "%llguidance"  # begins grammars that are Lark and nothing else
_KEPT = 64  # compiled grammars
_LONGEST_REASON = 300  # characters of the library's own message
_DEEPEST = 64  # levels of a schema
# What layouts of JSON need between values, a space or a line end with indentation: small models go on with white space for ever.
_WHITESPACE = r"( |\n( {0,40}|\t{0,10}))?"
# Half of the library's own bounds of what compiling may take, so that a request costs at most some tenths of a second.
_LIMITS = {"initial_lexer_fuel": 500_000, "max_grammar_size": 250_000, "max_lexer_states": 50_000, "verbose_errors": False}


class GrammarCompiler:
    """Compiles for one tokenizer; may be used by several threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer. Its vocabulary is read when a grammar is asked for first, which takes a while.
        vocab_size: columns of the model's logits.
        end_token_ids: the model's end tokens, allowed where a grammar may end.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, end_token_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_token_ids = sorted(token for token in end_token_ids if token < vocab_size)
        self._lock = threading.Lock()  # guards what is known; nobody compiles with it held
        self._compiling = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._known: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        """The grammar of what is wanted.

        Raises:
            RequestError: it is invalid, too large, or asks for what is not implemented.
        """
        if (known := self._find(wanted)) is not None:
            return known
        with self._compiling:
            if (known := self._find(wanted)) is not None:
                return known
            vocabulary = self._read_vocabulary()
            matcher = LLMatcher(vocabulary, _source(wanted), log_level=0, limits=LLParserLimits(**_LIMITS))  # type: ignore[arg-type]
            if matcher.is_error():
                raise RequestError(f"structured_outputs cannot be followed: {_reason(matcher.get_error())}")
            grammar = Grammar(matcher, vocabulary)
            if not grammar.can_begin():
                raise RequestError("structured_outputs cannot be followed: there is nothing that it allows to write")
        with self._lock:
            self._known[wanted] = grammar
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return grammar

    def _find(self, wanted: StructuredOutputsParams) -> Grammar | None:
        with self._lock:
            if (known := self._known.get(wanted)) is not None:
                self._known.move_to_end(wanted)
            return known

    def is_special(self, token: int) -> bool:
        """Whether grammars know a token by its name in angle brackets and not by its text."""
        with self._compiling:
            return bool(self._read_vocabulary().is_special_token(token))

    def _read_vocabulary(self) -> LLTokenizer:
        if self._vocabulary is None:
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise RequestError("structured_outputs need a fast tokenizer (tokenizer.json), which this model does not have")
            backend = copy(backend)
            backend.no_padding()
            backend.no_truncation()
            size = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True))
            # The library wants an end token even of models that have none; an output that can only end is ended without one.
            ends = self._end_token_ids or [self._tokenizer.eos_token_id or size - 1]
            try:
                self._vocabulary = LLTokenizer(backend.to_str(), n_vocab=size, eos_token=ends)
            except ValueError as error:
                raise RequestError(f"structured_outputs do not know this model's tokenizer: {_reason(str(error))}") from error
        return self._vocabulary


def _source(wanted: StructuredOutputsParams) -> str:
    """The grammar as the library reads it."""
    if wanted.json is not None or wanted.json_object:
        return _json_source(str(wanted.json) if wanted.json is not None else '{"type": "object"}', wanted)
    try:
        if wanted.regex is not None:
            return grammar_from("regex", wanted.regex)
        if wanted.choice is not None:  # as rules the library takes 2,000 of them at most, and each costs in every step
            return grammar_from("regex", "|".join(map(re.escape, wanted.choice)))
        assert wanted.grammar is not None
        return grammar_from("lark" if wanted.grammar.startswith(LARK_HEADER) else "grammar", wanted.grammar)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs cannot be followed: {_reason(str(error))}") from error


def _json_source(text: str, wanted: StructuredOutputsParams) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is not JSON: {_reason(str(error))}") from error
    if not isinstance(schema, dict | bool):
        raise RequestError("structured_outputs.json must be a JSON schema, which is an object")
    if _depth(schema) > _DEEPEST:
        raise RequestError(f"structured_outputs.json is nested too deeply: at most {_DEEPEST} levels")
    try:
        return json_grammar(schema, whitespace=whitespace_of(wanted))
    except (ValueError, RecursionError) as error:  # half characters, numbers of hundreds of digits
        raise RequestError(f"structured_outputs cannot be followed: {_reason(str(error))}") from error


def whitespace_of(wanted: StructuredOutputsParams) -> str:
    """The white space between values, as a regular expression; '' for none."""
    return wanted.whitespace_pattern or ("" if wanted.disable_any_whitespace else _WHITESPACE)


def json_grammar(schema: Any, *, whitespace: str = _WHITESPACE) -> str:
    """The grammar of a JSON schema as the library reads it."""
    schema = schema if isinstance(schema, dict) else {} if schema else {"not": {}}
    layout: Any = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(schema, overrides=layout)


def schema_on_one_line(schema: Mapping[str, Any], *, lenient: bool) -> dict[str, Any]:
    """A schema as part of a Lark grammar, of JSON on one line; lenient, what is not implemented is left out of it instead of
    refused."""
    return {**schema, "x-guidance": {"whitespace_pattern": " ?", "lenient": lenient}}


def _depth(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        deepest = max(deepest, level)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting += [(one, level + 1) for one in inner]
    return deepest


def _reason(text: str) -> str:
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."
