"""Bodies of the endpoints beside the completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from specontext.server.protocol.bounds import Name
from specontext.server.protocol.chat import TemplateBody
from specontext.server.protocol.common import Body


class TokenizeText(Body):
    prompt: str
    model: Name | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(TemplateBody):
    model: Name | None = None
    add_special_tokens: bool = Field(False, description="The chat template adds the special tokens.")
    return_token_strs: bool = False


def _kind(body: Any) -> str:
    """What a body for /tokenize is meant to be, so that errors speak of the right one."""
    return "TokenizeChat" if isinstance(body, TokenizeChat) or (isinstance(body, dict) and "messages" in body) else "TokenizeText"


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("TokenizeText")] | Annotated[TokenizeChat, Tag("TokenizeChat")], Discriminator(_kind)
]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    tokens: Annotated[list[int], Field(fail_fast=True)]
    model: Name | None = None


class DetokenizeResponse(BaseModel):
    prompt: str


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    weights: str | None = Field(default=None, description="What was done to the weights, such as 'dequantised from Q4_1'.")
    parent: None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Version(BaseModel):
    version: str
