"""Which library constrains outputs: time to compile schemas, time a token, size, in xgrammar, llguidance, outlines-core.

    python benchmarks/grammar_libraries.py TOKENIZER        # a directory with tokenizer.json; those libraries that are installed

Each library compiles the same JSON schemas, then walks the tokens of one document that each schema allows: fill the mask, accept
the token. What a schema costs the first time it is seen counts as compiling, so that lazy libraries pay for it a token. A table,
then one line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

Case = tuple[str, dict[str, Any], Any]
Step = Callable[[int], bool]  # fill the mask, then accept the token; whether it was allowed


def cases() -> list[Case]:
    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "mail": {"type": "string"}},
        "required": ["name", "age", "mail"],
        "additionalProperties": False,
    }
    nested = {
        "type": "object",
        "properties": {"team": {"type": "string"}, "people": {"type": "array", "items": {"$ref": "#/$defs/person"}}},
        "required": ["team", "people"],
        "additionalProperties": False,
        "$defs": {"person": person},
    }
    words = [f"value-{number}" for number in range(500)]
    choice = {
        "type": "object",
        "properties": {"kind": {"enum": words}, "of": {"anyOf": [person, {"type": "null"}]}},
        "required": ["kind", "of"],
        "additionalProperties": False,
    }
    names = [f"field_{number}" for number in range(150)]
    large = {
        "type": "object",
        "properties": {name: {"type": ["string", "number", "null"]} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    bounded = {
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 10, "maxLength": 400},
            "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            "many": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 40},
        },
        "required": ["text", "code", "many"],
        "additionalProperties": False,
    }
    somebody = {"name": "Ada Lovelace", "age": 36, "mail": "ada@example.org"}
    return [
        ("flat", person, somebody),
        ("nested", nested, {"team": "engines", "people": [somebody] * 8}),
        ("500 words", choice, {"kind": "value-321", "of": somebody}),
        ("150 fields", large, {name: number * 1.5 if number % 2 else "some text" for number, name in enumerate(names)}),
        ("bounded", bounded, {"text": "the quick brown fox " * 15, "code": "ABC-1234", "many": list(range(30))}),
    ]


def llguidance(tokenizer: Any, vocab_size: int) -> Callable[[dict[str, Any]], Step]:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
    from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask

    vocabulary, mask = from_tokenizer(tokenizer, vocab_size), allocate_token_bitmask(1, vocab_size)

    def compile_schema(schema: dict[str, Any]) -> Step:
        matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema(schema))
        assert not matcher.is_error(), matcher.get_error()

        def step(token: int) -> bool:
            fill_next_token_bitmask(matcher, mask)
            return bool(matcher.consume_token(token))

        return step

    return compile_schema


def xgrammar(tokenizer: Any, vocab_size: int) -> Callable[[dict[str, Any]], Step]:
    import xgrammar as xgr

    compiler = xgr.GrammarCompiler(xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size), cache_enabled=False)
    mask = xgr.allocate_token_bitmask(1, vocab_size)

    def compile_schema(schema: dict[str, Any]) -> Step:
        matcher = xgr.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))

        def step(token: int) -> bool:
            matcher.fill_next_token_bitmask(mask)
            return bool(matcher.accept_token(token))

        return step

    return compile_schema


def outlines(tokenizer: Any, vocab_size: int) -> Callable[[dict[str, Any]], Step]:
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema
    from outlines_core.kernels.torch import allocate_token_bitmask, fill_next_token_bitmask

    end = tokenizer.eos_token_id
    table: dict[bytes, list[int]] = {}
    for token in range(vocab_size):
        text = tokenizer.decode([token])
        if token != end and text and "\ufffd" not in text:
            table.setdefault(text.encode(), []).append(token)
    vocabulary, mask = Vocabulary(end, table), allocate_token_bitmask(vocab_size)

    def compile_schema(schema: dict[str, Any]) -> Step:
        guide = Guide(Index(build_regex_from_schema(json.dumps(schema)), vocabulary))

        def step(token: int) -> bool:
            fill_next_token_bitmask(guide, mask)
            guide.advance(token, return_tokens=False)
            return True

        return step

    return compile_schema


def measure(tokenizer: Any, make: Callable[[Any, int], Callable[[dict[str, Any]], Step]]) -> dict[str, Any]:
    began = time.perf_counter()
    compile_schema = make(tokenizer, len(tokenizer))
    found: dict[str, Any] = {"start_s": time.perf_counter() - began}
    for name, schema, document in cases():
        try:
            began = time.perf_counter()
            step = compile_schema(schema)
            compiled = time.perf_counter() - began
            times = []
            for token in tokenizer(json.dumps(document), add_special_tokens=False)["input_ids"]:
                begin = time.perf_counter()
                allowed = step(token)
                times.append(time.perf_counter() - begin)
                if not allowed:
                    raise ValueError("refuses a token of a document that the schema allows")
            found[name] = {
                "compile_ms": compiled * 1e3,
                "token_us": statistics.mean(times) * 1e6,
                "worst_token_us": max(times) * 1e6,
                "tokens": len(times),
            }
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return found


def size_of(distribution: str) -> float:
    """Megabytes that a distribution takes once it is installed."""
    files = importlib.metadata.files(distribution) or []
    return sum(Path(str(file.locate())).stat().st_size for file in files if Path(str(file.locate())).exists()) / 1e6


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(words[0])
    report: dict[str, Any] = {"benchmark": "grammar_libraries", "vocabulary": len(tokenizer)}
    for name, make in (("llguidance", llguidance), ("xgrammar", xgrammar), ("outlines-core", outlines)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        needs = [need for need in importlib.metadata.requires(name) or [] if "extra ==" not in need]
        report[name] = {"version": version, "megabytes": size_of(name), "needs": needs} | measure(tokenizer, make)
    for name, found in report.items():
        if isinstance(found, dict):
            print(f"\n{name} {found['version']}: {found['megabytes']:.1f} MB, needs {', '.join(found['needs']) or 'nothing'};")
            print(f"  vocabulary read in {found['start_s']:.2f} s")
            for case, _, _ in cases():
                each = found[case]
                words_of = each.get("error") or (
                    f"compiled in {each['compile_ms']:8.1f} ms, {each['token_us']:7.1f} us a token, worst "
                    f"{each['worst_token_us']:8.1f}, {each['tokens']} tokens"
                )
                print(f"  {case:11s} {words_of}")
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
