"""From bodies of other protocols to that of chat completions, in which everything is served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from specontext.server.protocol.chat import ChatRequest


def as_chat(fields: dict[str, Any], *, messages: str, response_format: str) -> ChatRequest:
    """The chat request that these fields say.

    Args:
        messages, response_format: what these are called in the other protocol, for errors.

    Raises:
        RequestValidationError: they say none.
    """
    try:
        chat = ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        names = {"messages": messages, "response_format": response_format}
        errors = [{**each, "loc": ("body", *_renamed(each["loc"], names))} for each in error.errors(include_url=False)]
        raise RequestValidationError(errors) from error
    chat._format_field = response_format
    return chat


def _renamed(loc: tuple[int | str, ...], names: Mapping[str, str]) -> tuple[int | str, ...]:
    return (names[str(loc[0])],) if loc and loc[0] in names else loc
