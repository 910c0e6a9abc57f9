"""From what a request asks for to a compiled grammar; each is compiled once, by whichever thread asks first."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any

import numpy
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from specontext.errors import RequestError
from specontext.grammars.grammar import Grammar
from specontext.sampling_params import StructuredOutputsParams

LARK_HEADER = "%llguidance"  # begins grammars that are Lark and nothing else
_KEPT = 64  # compiled grammars
_LONGEST_REASON = 300  # characters of the library's own message
_DEEPEST = 64  # levels of a schema
# What layouts of JSON need between values, a space or a line end with indentation: small models go on with white space for ever.
_WHITESPACE = r"( |\n( {0,40}|\t{0,10}))?"
# Half of the library's own bounds of what compiling may take, so that a request costs at most some tenths of a second.
_LIMITS = {"initial_lexer_fuel": 500_000, "max_grammar_size": 250_000, "max_lexer_states": 50_000, "verbose_errors": False}


_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$\n]")  # characters that regular expressions have a use for
_QUOTED = re.compile(r"\n *\d+ \| |<non-verbose/>")  # begins a quotation


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
            if error := matcher.get_error() or _dead_end(matcher):
                raise RequestError(f"structured_outputs cannot be followed: {_reason(error)}")
            grammar = Grammar(matcher, vocabulary)
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
        if wanted.choice is not None:
            return grammar_from("regex", choices_regex(wanted.choice))
        assert wanted.grammar is not None
        return grammar_from("lark" if wanted.grammar.startswith(LARK_HEADER) else "grammar", wanted.grammar)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs cannot be followed: {_reason(str(error))}") from error


def _dead_end(matcher: LLMatcher) -> str:
    """Why no output can begin, or go on behind its first token, as where there are too many ways; '' where one can."""
    probe = matcher.deep_copy()
    for _ in range(2):
        allowed = numpy.frombuffer(probe.compute_bitmask(), dtype=numpy.uint8)
        if probe.is_stopped() or probe.is_error():
            break
        if not allowed.any():
            return "there is no text that fits"
        byte = int(allowed.nonzero()[0][-1])
        probe.consume_token(8 * byte + int(allowed[byte]).bit_length() - 1)
    return str(probe.get_error())


def choices_regex(choices: Sequence[str]) -> str:
    """A regular expression of texts: thousands of them cost a step no more than one."""
    return "|".join(_SPECIAL.sub(lambda found: "\\n" if found[0] == "\n" else f"\\{found[0]}", choice) for choice in choices)


def _json_source(text: str, wanted: StructuredOutputsParams) -> str:
    schema = _read_schema(text)
    try:
        return json_grammar(schema, whitespace=whitespace_of(wanted))
    except (ValueError, RecursionError) as error:  # half characters, numbers of hundreds of digits
        raise RequestError(f"structured_outputs cannot be followed: {_reason(str(error))}") from error


def _read_schema(text: str) -> dict[str, Any] | bool:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is not JSON: {_reason(str(error))}") from error
    if not isinstance(schema, dict | bool):
        raise RequestError("structured_outputs.json must be a JSON schema, which is an object")
    if _depth(schema) > _DEEPEST:
        raise RequestError(f"structured_outputs.json is nested too deeply: at most {_DEEPEST} levels")
    return schema


def whitespace_of(wanted: StructuredOutputsParams) -> str:
    """The white space between values, as a regular expression; '' for none."""
    return wanted.whitespace_pattern or ("" if wanted.disable_any_whitespace else _WHITESPACE)


def json_grammar(schema: Any, *, whitespace: str = _WHITESPACE) -> str:
    """The grammar of a JSON schema as the library reads it."""
    schema = _without_notes(schema) if isinstance(schema, dict) else {} if schema else {"not": {}}
    layout: Any = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(schema, overrides=layout)


# Formats of the standard; any other is a note to readers, as the standard has it, and pydantic writes some (path, binary).
_FORMATS = frozenset(
    "date-time date time duration email idn-email hostname idn-hostname ipv4 ipv6 uri uri-reference iri iri-reference uuid "
    "uri-template json-pointer relative-json-pointer regex".split()
)
_DATA = ("const", "enum", "default", "examples")  # keys of a schema under which there are no schemas


def _without_notes(schema: Any) -> Any:
    """A schema without formats that nobody knows."""
    if isinstance(schema, list):
        return [_without_notes(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in _DATA else _without_notes(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in _FORMATS
    }


def schema_in_grammar(wanted: StructuredOutputsParams) -> dict[str, Any]:
    """The schema of what is wanted as part of a Lark grammar; raises RequestError."""
    schema = _read_schema(str(wanted.json) if wanted.json is not None else '{"type": "object"}')
    whitespace = whitespace_of(wanted)
    layout: dict[str, Any] = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    return {**(_without_notes(schema) if isinstance(schema, dict) else {} if schema else {"not": {}}), "x-guidance": layout}


def schema_on_one_line(schema: Mapping[str, Any], *, lenient: bool) -> dict[str, Any]:
    """A schema as part of a Lark grammar, of JSON on one line; lenient, what is not implemented is left out of it instead of
    refused."""
    return {**_without_notes(schema), "x-guidance": {"whitespace_pattern": " ?", "lenient": lenient}}


def _depth(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        deepest = max(deepest, level)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting += [(one, level + 1) for one in inner]
    return deepest


def _reason(text: str) -> str:
    """The library's own message, without what it quotes of the grammar, which may be of our making."""
    line = " ".join(_QUOTED.split(text, maxsplit=1)[0].encode("utf-8", "backslashreplace").decode().split())
    if line.startswith("NoExtension"):
        line = "there is no text that fits"
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."
