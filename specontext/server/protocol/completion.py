"""Bodies of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from specontext.server.protocol.bounds import MOST_PROMPTS
from specontext.server.protocol.common import Answered, SamplingBody, Usage, unsupported
from specontext.server.protocol.structured import StructuredBody


def _check_prompt(value: Any) -> Any:
    """One text, one list of token ids, or a list of either; checked by hand, since a long list has many wrong items."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("give a text, a list of token ids, or a list of texts or of lists of token ids")
    if not value:
        raise ValueError("the list is empty: give at least one prompt")
    if _is_ids(value):
        return value
    if all(isinstance(item, str) for item in value) or all(isinstance(item, list) and _is_ids(item) for item in value):
        if len(value) > MOST_PROMPTS:
            raise ValueError(f"{len(value)} prompts in one request are too many: at most {MOST_PROMPTS}")
        return value
    raise ValueError("give a text, a list of token ids, or a list of texts or of lists of token ids")


def _is_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _IDS,
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MOST_PROMPTS},
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MOST_PROMPTS},
    ]
}
Prompt = Annotated[Any, BeforeValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)]


class CompletionRequest(SamplingBody, StructuredBody):
    prompt: Prompt
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, lt=2**63)
    add_special_tokens: bool = True
    suffix: unsupported("filling in the middle is not implemented", "") = None  # type: ignore[valid-type]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str) or type(self.prompt[0]) is int:
            return [self.prompt]
        return list(self.prompt)

    @property
    def only_echo(self) -> bool:
        """Whether the prompt is all that is to come back."""
        return bool(self.echo) and self.max_tokens == 0


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def __add__(self, other: CompletionLogprobs) -> CompletionLogprobs:
        mine, more = dict(self), dict(other)
        return CompletionLogprobs(**{name: mine[name] + more[name] for name in mine})


class CompletionChoice(Answered):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
