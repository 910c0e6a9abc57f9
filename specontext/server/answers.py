"""What one output of a conversation has come to: thinking, text and calls of tools, as it grows."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field

from specontext.engine.output_statistics import OutputStatistics
from specontext.engine.request_stream import Delta
from specontext.models.tool_messages import short_id
from specontext.server.tools.choice import ToolUse
from specontext.server.tools.pieces import CallArguments, CallBegin, Piece, Text, Thought


@dataclass
class Call:
    """A call of a tool; the arguments are JSON as the model wrote it, in pieces."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.arguments)

    @property
    def whole(self) -> bool:
        """Whether the arguments are JSON to their end."""
        try:
            json.loads(self.text, strict=False)
        except (ValueError, RecursionError):
            return False
        return True


@dataclass(frozen=True)
class Growth:
    """What an output has grown by: `begun` is a call that begins, `arguments` belong to the call that began last, and a call is
    between an earlier text and one that is `apart`."""

    reasoning: str = ""
    text: str = ""
    apart: bool = False
    begun: Call | None = None
    arguments: str = ""

    @property
    def content(self) -> str:
        """The text, where all text of an output is one."""
        return f"\n\n{self.text}" if self.apart else self.text


class Answer:
    """One output.

    Attributes:
        finish_reason: as OpenAI names it, once the output has ended.
        called: it has ended so that its calls are made; the length, or a stop string amid the last one, ended it otherwise.
    """

    def __init__(self, use: ToolUse) -> None:
        self.use = use
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[Call] = []
        self.token_ids: list[int] = []
        self.tables: list[dict[int, float]] = []
        self.finish_reason: str | None = None
        self.called = False
        self.stats: OutputStatistics | None = None
        self.reasoning_tokens = 0
        self._reader = use.reader()
        self._dropping = False  # a call too many
        self._thinking = False  # the last piece was a thought
        self._calls_before_text = 0  # the last one

    def take(self, delta: Delta) -> list[Growth]:
        """Take what the engine has made; what there is to show."""
        self.reasoning_tokens = delta.reasoning_tokens
        self.token_ids += delta.token_ids
        self.tables += delta.logprobs or []
        pieces = self._reader.feed(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            pieces += self._reader.finish()
        grown = [Growth(reasoning=delta.reasoning)] if delta.reasoning else []
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
        grown += [growth for piece in pieces if (growth := self._grow(piece)) is not None]
        if delta.finish_reason is not None:
            self.stats, self.finish_reason = delta.stats, delta.finish_reason
            whole = bool(self.calls) and (delta.stop is None or self.calls[-1].whole)
            self.called = whole and delta.finish_reason == "stop"
            if self.called and self.use.mode != "named":  # then OpenAI says stop
                self.finish_reason = "tool_calls"
        return grown

    def _grow(self, piece: Piece) -> Growth | None:
        if isinstance(piece, Thought):
            self.reasoning.append(f"\n\n{piece.text}" if self.reasoning and not self._thinking else piece.text)
            self._thinking = True
            return Growth(reasoning=self.reasoning[-1])
        self._thinking = False
        if isinstance(piece, Text):
            apart = bool(self.content) and len(self.calls) > self._calls_before_text
            self._calls_before_text = len(self.calls)
            growth = Growth(text=piece.text, apart=apart)
            self.content.append(growth.content)
            return growth
        if isinstance(piece, CallBegin):
            self._dropping = bool(self.calls) and not self.use.several
            if self._dropping:
                return None
            self.calls.append(Call(self._new_id(), piece.name))
            return Growth(begun=self.calls[-1])
        assert isinstance(piece, CallArguments)
        if self._dropping:
            return None
        self.calls[-1].arguments.append(piece.text)
        return Growth(arguments=piece.text)

    def _new_id(self) -> str:
        name = uuid.uuid4().hex
        short = self.use.form is not None and self.use.form.id_length
        return short_id(name) if short else f"call_{name[:24]}"
