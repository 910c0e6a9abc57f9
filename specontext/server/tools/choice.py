"""What a request wants of its tools, and what that means for prompt, grammar and reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specontext.sampling_params import StructuredOutputsParams
from specontext.server.tools.formats import Format, read_forced
from specontext.server.tools.grammar import TokenOf, allowed_calls, calls_or_json, forced_calls, in_channels
from specontext.server.tools.pieces import Reader, Tool
from specontext.server.tools.reader import PlainReader


@dataclass(frozen=True)
class ToolUse:
    """Tools of one request.

    Attributes:
        tools: that may be called.
        mode: auto, required or named (one certain tool).
        several: more than one call is allowed.
        form: how the model writes calls; None where there are no tools, unless everything that it says has a form.
    """

    tools: Sequence[Tool] = ()
    mode: str = "auto"
    several: bool = True
    form: Format | None = None
    names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(tool.name for tool in self.tools))

    def reader(self) -> Reader:
        if self.form is None:
            return PlainReader()
        if self.form.channels:
            return self.form.reader({tool.name: tool for tool in self.tools})
        by_name = {tool.name: tool for tool in self.tools}
        forced = self.mode != "auto" and self.form.spelling is None
        return read_forced(by_name) if forced else self.form.reader(by_name)

    def grammar(self, token_of: TokenOf) -> StructuredOutputsParams | None:
        """What the output must look like; None for an output that is free."""
        if self.form is None:
            return None
        if self.form.channels:
            return in_channels(self.tools, self.mode, None, token_of)
        if self.mode != "auto":
            return forced_calls(self.tools, self.form, several=self.several and self.mode == "required", token_of=token_of)
        if not self.several or any(tool.strict for tool in self.tools):
            return allowed_calls(self.tools, self.form, several=self.several, token_of=token_of)
        return None

    def grammar_in_channels(self, wanted: StructuredOutputsParams, token_of: TokenOf) -> StructuredOutputsParams | None:
        """Calls, or what is wanted, in the form of a model that writes everything in channels."""
        return in_channels(self.tools, self.mode, wanted, token_of)

    def grammar_beside(self, schema: str, token_of: TokenOf) -> StructuredOutputsParams | None:
        """Calls, or JSON of a schema; None where the form has no grammar."""
        if self.form is None or self.form.spelling is None:
            return None
        return calls_or_json(self.tools, self.form, schema, several=self.several, token_of=token_of)


NO_TOOLS = ToolUse()
