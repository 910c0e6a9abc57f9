"""What chat and text completions share: sampling fields, usage, errors, and fields that are known but not supported."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from specontext.sampling_params import MOST_BAD_WORDS, MOST_STOP_TOKENS, MOST_STOPS
from specontext.server.protocol.bounds import MOST_OUTPUTS, Biases, Metadata, Name

MOST_ALLOWED = 1 << 18  # token ids


class Body(BaseModel):
    """A request's body: types are not converted, unknown fields are errors, and null is a field that was left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """Clients send null for what they leave to its default; where a field is needed null is an error all the same."""
        if not isinstance(value, dict) or not any(item is None for item in value.values()):
            return value
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: item for name, item in value.items() if item is not None or name not in optional}

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """Of the fields that nobody knows keep only the first: each of them would become an error."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        first = next(name for name in value if name not in cls.model_fields)
        return {name: item for name, item in value.items() if name in cls.model_fields or name == first}


def content_kind(*kinds: str) -> Any:
    """A part's type, which is one of these; what else there may be is refused by name."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value not in kinds:
            raise ValueError(f"content of type '{value[:50]}' is not supported: only '{kinds[0]}' is")
        return value

    return Annotated[Literal[kinds], BeforeValidator(check)]


class Answered(BaseModel):
    """A part of a response that leaves some fields out where they say nothing, since clients did not ask for them."""

    left_out: ClassVar[tuple[str, ...]] = ("token_ids", "prompt_token_ids", "tool_calls")

    @model_serializer(mode="wrap")
    def _without_empty(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = serialise(self)
        return {name: value for name, value in found.items() if value is not None or name not in self.left_out}


def unsupported(reason: str, *neutral: Any) -> Any:
    """The type of a field that is known but cannot be honoured: only values that ask for nothing are let through."""

    def check(value: Any) -> Any:
        if value is None or any(value == allowed and type(value) is type(allowed) for allowed in neutral):
            return value
        raise ValueError(f"{reason}; leave it out")

    allowed = [None, *neutral]
    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": allowed, "description": f"Not supported: {reason}."})]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="With include_usage: every event has the usage so far.")
    include_obfuscation: bool = Field(
        False, description="Pad events to multiples of 64 bytes, so that their lengths tell little. Off unless asked for."
    )


class SamplingBody(Body):
    """Fields that both kinds of completion take; None is the default of the model or of `SamplingParams`."""

    model: Name | None = Field(None, description="One of the names that /v1/models lists.")
    n: int | None = Field(None, ge=1, le=MOST_OUTPUTS)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**63, description="-1 and 0 are no restriction.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="-1 is none, as for vLLM.")
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=MOST_STOP_TOKENS)] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = Field(None, lt=2**63)
    min_tokens: int = Field(0, ge=0, lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    method: Name | None = Field(None, description="Selection method, among those that the server allows. Default: the server's.")
    budget: int | None = Field(None, ge=1, lt=2**63, description="KV entries to read, up to the server's budget, its default.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Name | None = Field(None, description="Accepted for compatibility; changes nothing.")
    metadata: Metadata | None = Field(None, description="Accepted for compatibility; changes nothing.")
    safety_identifier: Name | None = Field(None, description="Accepted for compatibility; changes nothing.")
    prompt_cache_key: Name | None = Field(None, description="Accepted for compatibility; changes nothing.")
    prompt_cache_retention: Name | None = Field(None, description="Accepted for compatibility; changes nothing.")
    logit_bias: Biases | None = None
    allowed_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=MOST_ALLOWED)] | None = None
    bad_words: Annotated[list[str], Field(fail_fast=True, max_length=MOST_BAD_WORDS)] | None = None
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, lt=2**63, description="Keep this many of the prompt's last tokens; -1 keeps what the context can hold."
    )
    return_token_ids: bool | None = Field(False, description="Also give the token ids of prompt and outputs.")
    priority: unsupported("requests are served in the order in which they come", 0) = None  # type: ignore[valid-type]
    service_tier: unsupported("there is one tier", "auto", "default") = None  # type: ignore[valid-type]
    store: unsupported("nothing is stored", False) = None  # type: ignore[valid-type]
    use_beam_search: unsupported("beam search is not implemented", False) = None  # type: ignore[valid-type]
    length_penalty: unsupported("beam search is not implemented", 1.0, 1) = None  # type: ignore[valid-type]
    early_stopping: unsupported("beam search is not implemented", False) = None  # type: ignore[valid-type]
    prompt_logprobs: unsupported("/v1/completions gives those of prompts, with echo and logprobs") = None  # type: ignore[valid-type]
    logits_processors: unsupported("no code runs for single requests", []) = None  # type: ignore[valid-type]
    spaces_between_special_tokens: unsupported("texts are as the tokenizer decodes them", True) = None  # type: ignore[valid-type]
    return_tokens_as_token_ids: unsupported("return_token_ids gives them beside the texts", False) = None  # type: ignore[valid-type]
    repetition_detection: unsupported("it is not implemented: use penalties") = None  # type: ignore[valid-type]
    cache_salt: unsupported("what is known of prompts is known to all requests") = None  # type: ignore[valid-type]
    request_id: unsupported("the header X-Request-Id names a request") = None  # type: ignore[valid-type]
    kv_transfer_params: unsupported("KV stays with its server", {}) = None  # type: ignore[valid-type]
    vllm_xargs: unsupported("they are vLLM's own", {}) = None  # type: ignore[valid-type]
    best_of: int | None = Field(None, description="Not supported beyond n: only the outputs that are returned are made.")

    @field_validator("best_of")
    @classmethod
    def _as_many_as_are_returned(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, 1, info.data.get("n")):
            raise ValueError("only the outputs that are returned are made; leave it out")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams only: leave them out, or set stream to true")
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        return self.wants_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def wants_obfuscation(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_obfuscation


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request, and what its decode steps really did."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = Field(None, description="With a reasoning parser.")
    specontext: dict[str, Any] | None = Field(
        None, description="Statistics of the request: settings, tokens read, bytes loaded, overlap, hit rate, times."
    )


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorInfo


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served as asked."},
    "5XX": {"model": ErrorResponse, "description": "The server failed, or is about to stop."},
}
COMPLETION_RESPONSES: dict[int | str, dict[str, Any]] = ERROR_RESPONSES | {
    200: {"content": {"text/event-stream": {}}, "description": "The whole answer, or with `stream` its pieces as events."}
}
