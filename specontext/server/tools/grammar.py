"""Grammars that force calls, or let them have only such arguments as their schemas allow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from specontext.errors import RequestError
from specontext.grammars.compiler import LARK_HEADER, choices_regex, schema_in_grammar, schema_on_one_line
from specontext.sampling_params import StructuredOutputsParams
from specontext.server.tools.formats import FORCED, MAYBE_SPACE, Format, Spelling
from specontext.server.tools.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, START, THOUGHT
from specontext.server.tools.pieces import Tool

MOST_CALLS = 64  # of one forced answer, so that a small model comes to its end
_MARK = re.compile(r"(</?tool_call>|<\|(?:tool_call|start|channel|message|constrain|end)\|>|\[TOOL_CALLS\]|\[ARGS\]|\x1f)")
_CALL_HEADERS = (  # of gpt-oss: the recipient behind the channel, or behind the role, which the prompt ends with
    f"{CHANNEL}commentary to=functions.NAME {CONSTRAIN}json{MESSAGE}",
    f" to=functions.NAME{CHANNEL}commentary json{MESSAGE}",
)

TokenOf = Callable[[str], int | None]  # the special token that a mark is, None where it is text


def forced_calls(tools: Sequence[Tool], form: Format, *, several: bool, token_of: TokenOf) -> StructuredOutputsParams:
    """One call, or with `several` perhaps more, and nothing else; schemas are followed as far as they can be."""
    spelling = form.spelling or FORCED
    lines = [f"start: {_calls(spelling, several, token_of)}", *_rules("call", tools, spelling, token_of, lenient=True)]
    return _params(lines)


def allowed_calls(tools: Sequence[Tool], form: Format, *, several: bool, token_of: TokenOf) -> StructuredOutputsParams | None:
    """Text, and calls behind it; None where the form has no grammar that can wait for a call."""
    spelling, mark = form.spelling, form.mark
    if spelling is None or not mark:
        return None
    calls = _calls(spelling, several, token_of)
    rules = _rules("call", tools, spelling, token_of, lenient=False)
    if len(mark) == 1:  # calls stand at the beginning or not at all
        return _params([f"start: PLAIN | {calls}", rf"PLAIN: /([^\{mark}\s](.|\n)*)?/", *rules])
    if token_of(mark) is not None:
        return _params([f"start: TEXT | TEXT {calls}", r"TEXT: /(.|\n)*/", *rules])
    opened = replace(spelling, open=spelling.open.removeprefix(mark))
    first = opened if spelling.open else replace(spelling, begin=spelling.begin.removeprefix(mark))
    rules += _rules("first", tools, first, token_of, lenient=False)
    calls = _calls(opened, several, token_of).replace("call", "first", 1)
    lines = [f"start: TEXT | marked {calls}", f"marked[lazy]: TEXT {json.dumps(mark)}", r"TEXT: /(.|\n)*/"]
    return _params([*lines, *rules])


def calls_or_json(
    tools: Sequence[Tool], form: Format, schema: str, *, several: bool, token_of: TokenOf
) -> StructuredOutputsParams:
    """Calls and nothing else, or JSON of a schema and nothing else."""
    spelling = form.spelling or FORCED
    calls = _calls(spelling, several, token_of)
    answer = json.dumps(schema_on_one_line(json.loads(schema), lenient=False))
    rules = _rules("call", tools, spelling, token_of, lenient=False)
    return _params([f"start: answer | {calls}", f"answer: %json {answer}", *rules])


def in_channels(
    tools: Sequence[Tool], mode: str, wanted: StructuredOutputsParams | None, token_of: TokenOf
) -> StructuredOutputsParams | None:
    """An output of gpt-oss: perhaps thinking, then a call, or an answer that looks as wanted; None where it is free.

    Raises:
        RequestError: what is wanted cannot be a part of it.
    """
    forced, strict = mode != "auto", any(tool.strict for tool in tools)
    if wanted is None and not forced and not strict:
        return None
    marked = token_of(END) is not None  # else nothing tells where thinking ends
    ways = ["call"] if tools else []
    ways += [] if forced else ["final"]
    lines = [f"start: {'thought? ' if marked else ''}({' | '.join(ways)})"]
    if marked:
        lines.append(f"thought: {_spelled(THOUGHT, token_of)} TEXT {_spelled(f'{END}{START}assistant', token_of)}")
    if not forced:
        preamble = f"({_spelled(f'{CHANNEL}commentary{MESSAGE}', token_of)} TEXT)" if marked and wanted is None else None
        final = f"{_spelled(f'{CHANNEL}final{MESSAGE}', token_of)} answer"
        lines += [f"final: {final}" + (f" | {preamble}" if preamble else ""), *_answer(wanted)]
    lines.append(r"TEXT: /(.|\n)*/")
    if tools:
        lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        header = " | ".join(_spelled(header.replace("NAME", tool.name), token_of) for header in _CALL_HEADERS)
        free = {"type": "object"} if not forced and not tool.strict else dict(tool.parameters) or {"type": "object"}
        schema = json.dumps(schema_on_one_line(free, lenient=not tool.strict))
        lines.append(f"call_{number}: ({header}) %json {schema}")
    return _params(lines)


def _answer(wanted: StructuredOutputsParams | None) -> list[str]:
    """The rule of an answer."""
    if wanted is None:
        return ["answer: TEXT"]
    if wanted.choice is not None:
        return _regex_answer(choices_regex(wanted.choice))
    if wanted.regex is not None:
        return _regex_answer(wanted.regex)
    if wanted.grammar is not None:
        raise RequestError(
            "structured_outputs.grammar cannot be a part of this model's channels: give a schema, a regex or choices"
        )
    return [f"answer: %json {json.dumps(schema_in_grammar(wanted))}"]


def _regex_answer(regex: str) -> list[str]:
    escaped = re.sub(r"\\.|[/\n]", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), regex, flags=re.DOTALL)
    return ["answer: ANSWER", f"ANSWER: /{escaped}/"]


def _calls(spelling: Spelling, several: bool, token_of: TokenOf) -> str:
    more = ""
    if several and spelling.several:
        more = f"({_spelled(spelling.between, token_of)} call){{0,{MOST_CALLS - 1}}}"
    return " ".join(
        part for part in (_spelled(spelling.open, token_of), "call", more, _spelled(spelling.close, token_of)) if part
    )


def _rules(rule: str, tools: Sequence[Tool], spelling: Spelling, token_of: TokenOf, *, lenient: bool) -> list[str]:
    lines = [f"{rule}: " + " | ".join(f"{rule}_{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        begin = _spelled(spelling.begin.replace("NAME", tool.name), token_of)
        free = {"type": "object"} if not lenient and not tool.strict else dict(tool.parameters) or {"type": "object"}
        schema = json.dumps(schema_on_one_line(free, lenient=lenient or not tool.strict))
        lines.append(f"{rule}_{number}: {begin} %json {schema} {_spelled(spelling.end, token_of)}")
    return lines


def _spelled(text: str, token_of: TokenOf) -> str:
    """A text in Lark, with its marks as the tokens that they are."""
    parts = []
    for part in filter(None, _MARK.split(text)):
        token = token_of(part) if _MARK.fullmatch(part) else None
        shown = json.dumps(part) if token is None else f"<[{token}]>"
        parts.append('" "?' if part == MAYBE_SPACE else shown)
    return " ".join(parts)


def _params(lines: Sequence[str]) -> StructuredOutputsParams:
    return StructuredOutputsParams(grammar="\n".join([f"{LARK_HEADER} {{}}", *lines]))
