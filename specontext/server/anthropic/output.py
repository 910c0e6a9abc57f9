"""From growing answers to blocks, and to the events that show them growing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from specontext.server.answers import Growth
from specontext.server.conversation import Conversation
from specontext.server.protocol.tools import arguments_object

Event = dict[str, Any]
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_EMPTY: dict[str, dict[str, Any]] = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}


class MessageWriter:
    """The one answer of a request, as blocks.

    Attributes:
        stop: the stop sequence that ended it.
    """

    def __init__(self, talk: Conversation) -> None:
        self.talk = talk
        self.stop: str | None = None
        self.id = f"msg_{talk.stream.request_id}"
        self.blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []

    def begin(self) -> Iterator[Event]:
        message = self.message() | {"content": [], "stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": message}

    def grow(self, growths: Sequence[Growth]) -> Iterator[Event]:
        for growth in growths:
            if growth.reasoning:
                yield from self._more("thinking", growth.reasoning, {"type": "thinking_delta", "thinking": growth.reasoning})
            elif growth.text:
                yield from self._more("text", growth.text, {"type": "text_delta", "text": growth.text})
            elif growth.begun is not None:
                yield from self._open({"type": "tool_use", "id": growth.begun.id, "name": growth.begun.name, "input": {}})
            elif growth.arguments:
                delta = {"type": "input_json_delta", "partial_json": growth.arguments}
                yield from self._more("tool_use", growth.arguments, delta)

    def end(self) -> Iterator[Event]:
        yield from self._close()
        message = self.message()
        delta = {name: message[name] for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, "usage": message["usage"]}
        yield {"type": "message_stop"}

    def message(self) -> dict[str, Any]:
        """The message as a whole."""
        usage = self.talk.usage()
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        answer = self.talk.answers[0]
        reason = "tool_use" if answer.called else _REASONS.get(answer.finish_reason or "")
        if self.stop is not None and reason == "end_turn":
            reason = "stop_sequence"
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.talk.state.model,
            "content": self.blocks,
            "stop_reason": reason,
            "stop_sequence": self.stop if reason == "stop_sequence" else None,
            "usage": {
                "input_tokens": usage.prompt_tokens - cached,
                "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": 0,
                "output_tokens": usage.completion_tokens,
            },
        }

    def _more(self, kind: str, text: str, delta: dict[str, Any]) -> Iterator[Event]:
        if kind != "tool_use" and (not self.blocks or not self._pieces or self.blocks[-1]["type"] != kind):
            yield from self._open({"type": kind, **_EMPTY[kind]})
        self._pieces.append(text)
        yield {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _open(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self.blocks.append(block)
        self._pieces = [""]
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _close(self) -> Iterator[Event]:
        if not self._pieces:
            return
        block, text = self.blocks[-1], "".join(self._pieces)
        self._pieces = []
        if block["type"] == "tool_use":
            block["input"] = arguments_object(text)
        else:
            block[block["type"]] = text
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}
