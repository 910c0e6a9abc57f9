"""From growing answers to items, and to the events that show them growing."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from specontext.engine.request_stream import Delta
from specontext.server.answers import Growth
from specontext.server.conversation import Conversation
from specontext.server.logprobs import chat_logprobs
from specontext.server.protocol.responses import ResponsesRequest

Item = dict[str, Any]
Event = dict[str, Any]
_STATUS = {"length": "incomplete"}


@dataclass
class _Open:
    """The item that is growing."""

    item: Item
    text: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


class ResponseWriter:
    """The one answer of a request, as items.

    Attributes:
        id: of the response.
        output: items so far.
    """

    def __init__(self, talk: Conversation, body: ResponsesRequest) -> None:
        self.talk, self.body = talk, body
        self.id, self.created = f"resp_{uuid.uuid4().hex}", time.time()
        self.output: list[Item] = []
        self._open: _Open | None = None
        self._waiting: list[Any] = []  # log-probabilities of tokens behind the last text that was shown
        self._number = -1

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self.response("in_progress"))
        yield self._event("response.in_progress", response=self.response("in_progress"))

    def grow(self, delta: Delta, growths: Sequence[Growth]) -> Iterator[Event]:
        """Events of what came at once; log-probabilities go with the first text that comes with or after their tokens."""
        self._waiting += self._logprobs(delta)
        for growth in growths:
            if growth.reasoning:
                yield from self._text("reasoning", growth.reasoning)
            elif growth.text:
                yield from self._text("message", growth.text)
            elif growth.begun is not None:
                yield from self._close("completed")
                call = growth.begun
                item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
                yield from self._begin(item | {"call_id": call.id, "name": call.name, "arguments": ""})
            elif growth.arguments:
                assert self._open is not None
                self._open.text.append(growth.arguments)
                yield self._of_item("response.function_call_arguments.delta", delta=growth.arguments)

    def end(self) -> Iterator[Event]:
        """The answer is complete."""
        status = self.status
        if not self.output and self._open is None:  # nothing was said, which is a message all the same
            yield from self._text("message", "")
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self.response(status))

    @property
    def status(self) -> str:
        return _STATUS.get(self.talk.answers[0].finish_reason or "", "completed")

    def response(self, status: str) -> dict[str, Any]:
        """The response as a whole."""
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": time.time() if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.talk.state.model,
            "output": list(self.output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": self.talk.stream.params.temperature,
            "text": {"format": self._format(), "verbosity": "medium"},
            "tool_choice": _plain(body.tool_choice) or "auto",
            "tools": [tool.model_dump(exclude={"defer_loading"}) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self.talk.stream.params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if status != "in_progress" else None,
            "user": body.user,
        }

    def failed(self, code: str | int, message: str) -> Event:
        """The event of an answer that broke."""
        response = self.response("in_progress") | {"status": "failed", "error": {"code": "server_error", "message": message}}
        return self._event("response.failed", response=response, code=code)

    def _format(self) -> dict[str, Any]:
        form = self.body.text.format if self.body.text is not None else None
        return form.model_dump(by_alias=True, exclude_none=True) if form is not None else {"type": "text"}

    def _usage(self) -> dict[str, Any]:
        usage = self.talk.usage()
        cached, thought = usage.prompt_tokens_details, usage.completion_tokens_details
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached.cached_tokens if cached else 0, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": thought.reasoning_tokens if thought else 0},
            "total_tokens": usage.total_tokens,
            "specontext": usage.specontext,
        }

    def _logprobs(self, delta: Delta) -> list[Any]:
        if not delta.logprobs:
            return []
        found = chat_logprobs(delta.token_ids, delta.logprobs, self.body.top_logprobs or 0, self.talk.state.texts)
        return [each.model_dump() for each in found.content]

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        if self._open is None or self._open.item["type"] != kind:
            yield from self._close("completed")
            if kind == "message":
                item = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "role": "assistant", "status": "in_progress"}
            else:
                item = {"id": f"rs_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
            yield from self._begin(item | {"content": []} | ({"summary": []} if kind == "reasoning" else {}))
            yield self._of_item("response.content_part.added", content_index=0, part=self._part(kind, "", []))
        if text:
            assert self._open is not None
            yield self._delta(self._open, text)

    def _delta(self, opened: _Open, text: str) -> Event:
        """More of the item that is open; with no text it is what waits for some in vain."""
        kind = opened.item["type"]
        opened.text.append(text)
        more: dict[str, Any] = {}
        if kind == "message":
            more, self._waiting = {"logprobs": self._waiting}, []
            opened.logprobs += more["logprobs"]
        return self._of_item(f"response.{_NAMES[kind]}.delta", content_index=0, delta=text, **more)

    def _part(self, kind: str, text: str, logprobs: list[Any]) -> dict[str, Any]:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _begin(self, item: Item) -> Iterator[Event]:
        self._open = _Open(item)
        yield self._event("response.output_item.added", output_index=len(self.output), item=dict(item))

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        item, kind = self._open.item, self._open.item["type"]
        if kind == "message" and self._waiting:  # of an end token, of text that is not shown
            yield self._delta(self._open, "")
        text = "".join(self._open.text)
        if kind == "function_call":
            yield self._of_item("response.function_call_arguments.done", arguments=text, name=item["name"])
            item["arguments"] = text
        else:
            part = self._part(kind, text, self._open.logprobs)
            more = {"logprobs": self._open.logprobs} if kind == "message" else {}
            yield self._of_item(f"response.{_NAMES[kind]}.done", content_index=0, text=text, **more)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
            item["content"] = [part]
        item["status"] = status
        self._open = None
        self.output.append(item)
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=dict(item))

    def _of_item(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        return self._event(kind, item_id=self._open.item["id"], output_index=len(self.output), **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}


_NAMES = {"message": "output_text", "reasoning": "reasoning_text"}


def _plain(choice: Any) -> Any:
    return choice.model_dump() if hasattr(choice, "model_dump") else choice
