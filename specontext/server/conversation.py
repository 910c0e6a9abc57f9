"""One request for a conversation on its way through the engine, whatever protocol it came in."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import NamedTuple

from fastapi import Request

from specontext.engine.request_stream import Delta, RequestStream
from specontext.sampling_params import SamplingParams, Thinking
from specontext.server.answers import Answer, Growth
from specontext.server.context import note
from specontext.server.prompts import ChatPrompt
from specontext.server.protocol.chat import ChatRequest
from specontext.server.protocol.common import Usage
from specontext.server.sampling import chat_params, kept_tokens
from specontext.server.state import ServerState
from specontext.server.tools.choice import ToolUse
from specontext.server.usage import make_usage


class Prepared(NamedTuple):
    """A request that can be submitted."""

    token_ids: list[int]
    params: SamplingParams
    use: ToolUse


async def prepare(state: ServerState, body: ChatRequest) -> Prepared:
    """Everything that comes before the engine.

    Raises:
        SpeContextError: the request cannot be served; it says why.
    """
    use = state.tools.use(body)
    prompt = await state.encoder.messages(body, keep=kept_tokens(body, state.max_model_len))
    params = chat_params(
        body,
        len(prompt.token_ids),
        max_len=state.max_model_len,
        max_logprobs=state.config.max_logprobs,
        defaults=state.defaults,
        thinking=_thinking(state, body, prompt),
    )
    if use.form is not None:
        params = replace(params, skip_special_tokens=False)  # marks of calls may be special tokens
    if state.tools.channels:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *state.tools.end_ids))
    field = "tools" if use.tools else body.structured_field
    structured = await state.compile(lambda: state.tools.structured(use, body.structured_params()), field)
    return Prepared(prompt.token_ids, replace(params, structured_outputs=structured), use)


def _thinking(state: ServerState, body: ChatRequest, prompt: ChatPrompt) -> Thinking | None:
    if state.reasoning is None:
        return None
    return state.reasoning.thinking(prompt.text, continued=body.messages[-1].text if body.continue_final_message else None)


class Conversation:
    """What has become of a request.

    Attributes:
        answers: one for each output.
        completion_tokens: of all outputs so far.
    """

    def __init__(self, state: ServerState, stream: RequestStream, use: ToolUse) -> None:
        self.state, self.stream, self.use = state, stream, use
        self.answers = [Answer(use) for _ in range(stream.count)]
        self.completion_tokens = 0

    @classmethod
    async def begin(cls, request: Request, state: ServerState, body: ChatRequest) -> Conversation:
        """Check a request and queue it; the caller must read it to its end or abort its stream."""
        prepared = await prepare(state, body)
        name = uuid.uuid4().hex
        stream = await state.submit(name, [prepared.token_ids], prepared.params, streaming=bool(body.stream))
        note(request, engine_id=stream.request_id)
        return cls(state, stream, prepared.use)

    @property
    def prompt_token_ids(self) -> list[int]:
        return list(self.stream.prompts[0])

    async def grow(self) -> AsyncIterator[list[tuple[Delta, list[Growth]]]]:
        """What the outputs grow by, until all have ended."""
        async for deltas in self.stream:
            self.completion_tokens += sum(len(delta.token_ids) for delta in deltas)
            yield [(delta, self.answers[delta.index].take(delta)) for delta in deltas]

    async def finish(self, request: Request) -> None:
        """Wait for all outputs."""
        async for _ in self.grow():
            pass
        self.note(request)

    def usage(self) -> Usage:
        prompt_tokens, stats = len(self.stream.prompts[0]), [answer.stats for answer in self.answers]
        thought = sum(answer.reasoning_tokens for answer in self.answers) if self.stream.params.thinking is not None else None
        return make_usage(prompt_tokens, self.completion_tokens, stats, n=len(stats), reasoning_tokens=thought)

    def note(self, request: Request) -> None:
        """Add what has become of it to its line in the log."""
        note(
            request,
            prompt_tokens=len(self.stream.prompts[0]),
            completion_tokens=self.completion_tokens,
            finish_reason=",".join(answer.finish_reason or "none" for answer in self.answers),
        )
