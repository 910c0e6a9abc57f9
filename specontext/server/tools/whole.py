"""Calls that can be read only when they are complete: the syntax of Python, and values between tags."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from specontext.server.tools.json_types import argument_types, type_of
from specontext.server.tools.pieces import Tool

_HALF = re.compile("[\ud800-\udfff]")
_LITERALS = {"true": True, "false": False, "null": None, "none": None}
# A closing tag closes something only where what may come behind it does; else it is a part of a value.
_FUNCTION = re.compile(r"<function=([^<>\s]+)>(.*?)(?:</function>(?=\s*(?:<function=|</tool_call>|\Z))|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^<>\s]+)>(.*?)(?:</parameter>(?=\s*(?:<parameter=|</function>|</tool_call>|\Z))|(?=<parameter=)|\Z)", re.DOTALL
)
_PAIR = re.compile(r"<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>(?=\s*(?:<arg_key>|\Z))|\Z)", re.DOTALL)


def python_calls(text: str, tools: Mapping[str, Tool]) -> list[tuple[str, str]] | None:
    """`[f(a=1), g(b="x")]`, with the names of JSON for its constants too."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
        found = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
                return None
            name = ast.unparse(node.func)
            if name not in tools or len({keyword.arg for keyword in node.keywords}) < len(node.keywords):
                return None
            arguments = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
            found.append((name, _as_json(arguments)))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):  # no Python, or values that JSON does not have
        return None
    return found


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in _LITERALS:
        return _LITERALS[node.id.lower()]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:  # nor does JSON have **others
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
    return ast.literal_eval(node)


def function_tags(text: str, tools: Mapping[str, Tool]) -> list[tuple[str, str]] | None:
    """`<function=name><parameter=key>value</parameter></function>`, as Qwen3-Coder writes it."""
    found = []
    for name, inner in _FUNCTION.findall(text):
        if name not in tools:
            return None
        pairs = [(key, value.removeprefix("\n").removesuffix("\n")) for key, value in _PARAMETER.findall(inner)]
        found.append((name, _typed(pairs, tools[name])))
    return found


def argument_tags(text: str, tools: Mapping[str, Tool]) -> list[tuple[str, str]] | None:
    """`name <arg_key>key</arg_key><arg_value>value</arg_value>`, as GLM-4.5 writes it."""
    name = text.partition("<arg_key>")[0].strip()
    if name not in tools:
        return None
    return [(name, _typed([(key.strip(), value) for key, value in _PAIR.findall(text)], tools[name]))]


def _typed(pairs: list[tuple[str, str]], tool: Tool) -> str:
    """Arguments as JSON: texts where the schema lets them be nothing else, else what the value says."""
    return _as_json({key: _value(value, argument_types(tool.parameters, key)) for key, value in pairs})


def _value(text: str, types: frozenset[str] | None) -> Any:
    """What a text says; the text itself where it may be one and says nothing else that it may be."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        value = _LITERALS.get(text.strip().lower(), text)
        if types is not None and "string" not in types and isinstance(value, str):
            value = _python_value(text, types)
    if types is not None and "string" in types and (isinstance(value, str) or type_of(value) not in types):
        return text
    return value


def _python_value(text: str, types: frozenset[str]) -> Any:
    """A list or an object as Python writes it, as some models do, where it may be one; else the text."""
    try:
        value = _literal(ast.parse(text.strip(), mode="eval").body)
        json.dumps(value, allow_nan=False)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, list | dict) and type_of(value) in types else text


def _as_json(value: Any) -> str:
    """JSON of it, half characters written as escapes, since UTF-8 has none.

    Raises:
        TypeError, ValueError: JSON has no such value; NaN and infinity are none either.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or not _HALF.search(text) else json.dumps(value)
