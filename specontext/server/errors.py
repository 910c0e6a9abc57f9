"""Errors as clients see them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from specontext.errors import EngineDeadError, QueueFullError, RequestError, SpeContextError
from specontext.server.protocol.common import SamplingBody

logger = logging.getLogger("specontext.server")

RETRY_AFTER = "1"  # seconds; a place in the queue is free as soon as any request ends
_LONGEST_PARAM = 100  # characters
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """An error with everything its response says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers=headers)
        self.param, self.code = param, code


class DrainingError(SpeContextError):
    """The server is about to stop."""


def as_api_error(error: Exception) -> ApiError:
    """What an error of the engine means to a client; one that nobody expected is logged and tells nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": RETRY_AFTER})
    if isinstance(error, DrainingError):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": RETRY_AFTER, "Connection": "close"})
    if isinstance(error, RequestError):
        first = str(error).partition(" ")[0].rstrip(":")  # such messages begin with the name of the field at fault
        return ApiError(400, str(error), param=first if first in SamplingBody.model_fields else None)
    if isinstance(error, EngineDeadError):
        return ApiError(500, str(error), code="engine_dead")
    if isinstance(error, SpeContextError):
        return ApiError(500, str(error), code="request_failed")
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "the server made an error; its log says which", code="internal_error")


def error_body(error: ApiError) -> dict[str, Any]:
    kind = TYPES.get(error.status_code, "server_error" if error.status_code >= 500 else "invalid_request_error")
    return {"error": {"message": error.detail, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: Exception) -> Response:
    known = as_api_error(error)
    body = json.dumps(error_body(known))  # in ASCII: a message may quote half a character
    headers = dict(known.headers) if known.headers else None
    return Response(body, known.status_code, headers=headers, media_type="application/json")


def install_handlers(app: FastAPI) -> None:
    """Have every error of a route answered in the one form."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def handle_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_invalid(error))

    app.add_exception_handler(HTTPException, handle)
    app.add_exception_handler(SpeContextError, handle)
    app.add_exception_handler(RequestValidationError, handle_invalid)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of the things that are wrong with a body."""
    first = _telling(error.errors())
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    param = ".".join(str(part) for part in first["loc"][1:] if not _is_tag(part)) or None
    if param is not None and len(param) > _LONGEST_PARAM:
        param = f"{param[:_LONGEST_PARAM]}..."
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"'{param}' is not known or not supported here: leave it out", param=param, code="unknown_parameter")
    if param is None and first["type"] in ("missing", "model_attributes_type"):
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def _telling(errors: Sequence[Any]) -> Any:
    """The first error; where a field may have several types, that of the type which the value has."""
    of_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    return next((error for error in of_field if not error["type"].endswith("_type")), errors[0])


def _is_tag(part: str | int) -> bool:
    """Whether a part of an error's place is no field but one of a field's types, such as `str` or `list[TextPart]`."""
    return isinstance(part, str) and (part == "str" or not part.isidentifier() or part[0].isupper())
