"""The forms in which models of different families write calls: how each is read, and the grammar that forces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from specontext.server.tools.blocks import BareBlock, Block, BracketBlock, JsonBlock, NamedBlock, WholeBlock
from specontext.server.tools.harmony import HarmonyReader
from specontext.server.tools.pieces import Reader, Text, Tool
from specontext.server.tools.reader import BlockReader
from specontext.server.tools.whole import argument_tags, function_tags, python_calls

Tools = Mapping[str, Tool]


@dataclass(frozen=True)
class Spelling:
    """How calls are written around their arguments, for a grammar.

    Attributes:
        open, close: around all calls.
        begin: in front of the arguments of one; NAME stands for the tool.
        end, between: behind them, and between two calls.
        several: there can be more than one call.
    """

    begin: str
    end: str
    open: str = ""
    close: str = ""
    between: str = ""
    several: bool = True


@dataclass(frozen=True)
class Format:
    """One form of calls.

    Attributes:
        reader: makes a reader for some tools.
        spelling: for a grammar; None where arguments are not written as JSON, and forced calls take `FORCED`.
        mark: what opens calls, after which a grammar can be followed where text may come first; a single character where calls
            stand at the beginning or not at all.
        id_length: characters of the ids of calls that its templates want; 0 where any will do.
        signs: texts of which all stand in chat templates of this form.
        channels: everything that the model says has this form, also where there are no tools.
    """

    reader: Callable[[Tools], Reader]
    spelling: Spelling | None
    mark: str
    signs: tuple[str, ...]
    id_length: int = 0
    channels: bool = False


def _json(mark: str, close: str = "", *, first: str = "") -> Callable[[Tools], Reader]:
    """Objects behind a mark, or at the beginning of the output with one of the characters `first`."""

    def make(tools: Tools) -> Reader:
        marks = ((mark,) if mark else ()) + tuple(first)
        return BlockReader(lambda opened: JsonBlock(tools, opened=opened, close=close if opened else ""), marks=marks)

    return make


def _whole(mark: str, close: str, read: Callable[[str, Tools], Any]) -> Callable[[Tools], Reader]:
    def make(tools: Tools) -> Reader:
        return BlockReader(lambda opened: WholeBlock(lambda text: read(text, tools), opened=opened, close=close), marks=(mark,))

    return make


def _function_tags(tools: Tools) -> Reader:
    """Functions in calls, or without what opens a call, which Qwen3-Coder often leaves out."""
    bare, close = "<function=", "</tool_call>"

    def make(opened: str) -> Block:
        if opened.endswith(bare):
            return BareBlock(lambda text: function_tags(bare + text, tools), opened=opened, close="</function>", dropped=close)
        return WholeBlock(lambda text: function_tags(text, tools), opened=opened, close=close)

    return BlockReader(make, marks=("<tool_call>", bare))


def _python(tools: Tools) -> Reader:
    skipped = ("<|python_start|>", "<|python_end|>")
    return BlockReader(lambda _: BracketBlock(lambda text: python_calls(text, tools)), marks=("[",), skipped=skipped)


def _mistral(tools: Tools) -> Reader:
    """Lists behind one mark, or a name and its arguments behind each."""
    return BlockReader(lambda opened: _MistralBlock(tools, opened), marks=("[TOOL_CALLS]",))


class _MistralBlock:
    """What follows the mark decides between its two forms."""

    def __init__(self, tools: Tools, opened: str) -> None:
        self._tools, self._opened = tools, opened
        self._blanks: list[str] = []
        self._block: Block | None = None

    def feed(self, text: str) -> Any:
        if self._block is None:
            self._blanks.append(text)
            ahead = text.lstrip()
            if not ahead:
                return [], None
            listed = ahead[0] in "[{"
            between = r"(?:\[CALL_ID\][A-Za-z0-9_-]{0,40})?(?:\[ARGS\])?\s*"
            self._block = (
                JsonBlock(self._tools, opened=self._opened) if listed else NamedBlock(self._tools, between, opened=self._opened)
            )
            text = "".join(self._blanks)
        return self._block.feed(text)

    def finish(self) -> Any:
        return self._block.finish() if self._block is not None else [Text("".join((self._opened, *self._blanks)))]


def _glm4(tools: Tools) -> Reader:
    """A name on the first line, and an object below it."""
    initials = tuple(sorted({name[0] for name in tools}))
    return BlockReader(lambda _: NamedBlock(tools, r"[ \t]*\n\s*"), marks=initials)


MAYBE_SPACE = "\x1f"  # in a spelling: a space that some tokenizers have there, and others not
_OBJECT = '{"name": "NAME", "arguments": '
# Where arguments are not written as JSON, forced calls are a list of objects all the same.
FORCED = Spelling(_OBJECT, "}", open="[", close="]", between=", ")
read_forced = _json("", first="[")

FORMATS: dict[str, Format] = {
    "hermes": Format(
        _json("<tool_call>", "</tool_call>"),
        Spelling(f"<tool_call>\n{_OBJECT}", "}\n</tool_call>", between="\n"),
        "<tool_call>",
        ("<tool_call>",),
    ),
    "llama3_json": Format(
        _json("<|python_tag|>", first="{"),
        Spelling('{"name": "NAME", "parameters": ', "}", between="; "),
        "{",
        ("<|python_tag|>",),
    ),
    "pythonic": Format(_python, None, "[", ("func_name1(params_name1=params_value1",)),
    "mistral": Format(
        _mistral,
        Spelling(_OBJECT, "}", open=f"[TOOL_CALLS]{MAYBE_SPACE}[", close="]", between=", "),
        "[TOOL_CALLS]",
        ("[TOOL_CALLS]",),
        id_length=9,
    ),
    "mistral_args": Format(
        _mistral,
        Spelling("[TOOL_CALLS]NAME[ARGS]", ""),
        "[TOOL_CALLS]",
        ("[TOOL_CALLS]", "[ARGS]"),
        id_length=9,
    ),
    "glm4": Format(_glm4, Spelling("NAME\n", "", several=False), "", ("<|observation|>",)),
    "glm45": Format(_whole("<tool_call>", "</tool_call>", argument_tags), None, "<tool_call>", ("<arg_key>",)),
    "qwen3_coder": Format(_function_tags, None, "<tool_call>", ("<function=",)),
    "granite": Format(
        _json("<|tool_call|>"),
        Spelling(_OBJECT, "}", open="<|tool_call|>[", close="]", between=", "),
        "<|tool_call|>",
        ("<|tool_call|>",),
    ),
    "harmony": Format(HarmonyReader, None, "", ("<|channel|>", "<|start|>assistant"), channels=True),
    "phi4_mini_json": Format(
        _json("functools"),
        Spelling(_OBJECT, "}", open="functools[", close="]", between=", "),
        "functools",
        ("<|tool|>",),
    ),
}
# The first form all of whose signs a template has; those that others' templates have too come last.
_ORDER = (
    "harmony", "glm45", "qwen3_coder", "mistral_args", "mistral", "granite", "phi4_mini_json", "pythonic", "hermes",
    "llama3_json", "glm4",
)  # fmt: skip


def detect(template: str) -> str | None:
    """The form of calls that a chat template shows, None for none that is known."""
    if "tools" not in template:
        return None
    found = next((name for name in _ORDER if all(sign in template for sign in FORMATS[name].signs)), None)
    if found is not None:
        return found
    if '"parameters"' in template and "Respond in the format" in template:  # Llama 3.2
        return "llama3_json"
    return "phi4_mini_json" if "functools[" in template else None
