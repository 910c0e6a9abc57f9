"""From bodies of other protocols to that of chat completions, in which everything is served."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from specontext.server.protocol.chat import ChatRequest


def as_chat(fields: dict[str, Any], *, place: str) -> ChatRequest:
    """The chat request that these fields say.

    Args:
        place: what stands for `messages` in the other protocol, for errors.

    Raises:
        RequestValidationError: they say none.
    """
    try:
        return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *_renamed(each["loc"], place))} for each in error.errors(include_url=False)]
        raise RequestValidationError(errors) from error


def _renamed(loc: tuple[int | str, ...], place: str) -> tuple[int | str, ...]:
    return (place,) if loc[:1] == ("messages",) else loc
