"""What the server can do with tools: the form of the model's calls, and what a request's tools mean in it."""

from __future__ import annotations

from typing import Any

from specontext.grammars.compiler import GrammarCompiler
from specontext.sampling_params import StructuredOutputsParams
from specontext.server.errors import ApiError
from specontext.server.protocol.chat import ChatRequest
from specontext.server.protocol.tools import AllowedChoice, FunctionTool, NamedChoice
from specontext.server.tools.choice import NO_TOOLS, ToolUse
from specontext.server.tools.formats import FORMATS, detect
from specontext.server.tools.harmony import ENDS
from specontext.server.tools.pieces import Tool

_NO_FORM = (
    "the chat template shows no form of tool calls that is known: start the server with --tool-call-parser NAME, and with "
    "--chat-template where the template has no place for tools (--chat-template hermes is one for ChatML)"
)


class ToolSupport:
    """Tools with one chat template.

    Args:
        parser: a name of `FORMATS`, 'auto' for what the template shows, or 'none'.

    Attributes:
        end_ids: tokens that end an output in channels, whether or not the model's settings know them.
    """

    def __init__(self, parser: str, tokenizer: Any, grammars: GrammarCompiler) -> None:
        template = tokenizer.chat_template or ""
        text = "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template)
        found = detect(text)
        self.name = found if parser == "auto" else None if parser == "none" else parser
        named = self.name or found
        self._without_tools = ToolUse(form=FORMATS[named]) if named is not None and FORMATS[named].channels else NO_TOOLS
        self._tokenizer, self._grammars = tokenizer, grammars
        ids = [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in (ENDS if self.channels else ())]
        self.end_ids = tuple(int(found[0]) for found in ids if len(found) == 1)

    @property
    def channels(self) -> bool:
        """Whether the model writes everything in channels, its thinking too."""
        return self._without_tools.form is not None

    def use(self, body: ChatRequest) -> ToolUse:
        """The tools of a request.

        Raises:
            ApiError: the server cannot read calls of this model.
        """
        tools, choice = [_tool(tool) for tool in body.shown_tools], body.tool_choice
        if not tools:
            return self._without_tools
        if self.name is None:
            raise ApiError(400, f"tools cannot be used: {_NO_FORM}", param="tools", code="tools_not_supported")
        form, several = FORMATS[self.name], body.parallel_tool_calls is not False
        if isinstance(choice, NamedChoice):
            return ToolUse([tool for tool in tools if tool.name == choice.function.name], "named", False, form)
        mode = "required" if choice == "required" else "auto"
        if isinstance(choice, AllowedChoice):
            names = {tool.function.name for tool in choice.allowed_tools.tools}
            tools, mode = [tool for tool in tools if tool.name in names], choice.allowed_tools.mode
        return ToolUse(tools, mode, several, form)

    def structured(self, use: ToolUse, wanted: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
        """What an output must look like that may call tools and else looks as `wanted`.

        Raises:
            ApiError: both at once are not possible.
        """
        if use.form is None:
            return wanted
        if wanted is None or use.mode != "auto":
            return use.grammar(self.token_of)
        if use.form.channels:
            return use.grammar_in_channels(wanted, self.token_of)
        schema = '{"type": "object"}' if wanted.json_object else wanted.json
        found = use.grammar_beside(str(schema), self.token_of) if schema is not None else None
        if found is None:
            raise ApiError(
                400,
                "structured outputs beside tools must be JSON, and the form of this model's calls too: leave one of them out",
                param="tools",
            )
        return found

    def token_of(self, mark: str) -> int | None:
        """The special token that a mark of calls is, None where grammars know it as text."""
        ids = self._tokenizer(mark, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 and self._grammars.is_special(ids[0]) else None


def _tool(tool: FunctionTool) -> Tool:
    function = tool.function
    return Tool(function.name, {**(function.parameters or {}), "type": "object"}, bool(function.strict))
