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
from starlette.types import Scope

from specontext.errors import (
    ConstraintError,
    EngineDeadError,
    NoTokenLeftError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    SpeContextError,
)
from specontext.server.facts import FACTS
from specontext.server.protocol.common import SamplingBody

logger = logging.getLogger("specontext.server")

RETRY_AFTER = "1"  # seconds; a place in the queue is free as soon as any request ends
_LONGEST_PARAM = 100  # characters
_IMPOSSIBLE = (NoTokenLeftError, ConstraintError)  # what a request asks for cannot be written
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


NOT_SERVED = {
    "embeddings": "embeddings are not made here: this server writes text",
    "rerank": "reranking is not done here: this server writes text",
    "score": "scoring is not done here: completions with echo and logprobs give log-probabilities",
    "moderations": "moderation is not done here: this server writes text",
    "audio": "audio is not supported: this server writes text",
    "images": "images are not supported: this server writes text",
    "files": "files are not stored here",
    "batches": "batches are not kept here: send the requests themselves, many at a time",
    "assistants": "assistants are not kept here: use /v1/responses",
    "threads": "threads are not kept here: use /v1/responses with previous_response_id",
    "fine_tuning": "models are not trained here",
}
_LONGEST_REASON = 160  # characters of a message in the log


class ApiError(HTTPException):
    """An error with everything its response says.

    Args:
        quotes: the message may have words of the conversation behind its first colon.
        anthropic: the message for clients of Anthropic's protocol, where they know an error by its words.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        quotes: bool = False,
        anthropic: str | None = None,
    ) -> None:
        super().__init__(status, message, headers=headers)
        self.anthropic = anthropic or message
        self.param, self.code, self.quotes = param, code, quotes


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
    if isinstance(error, RequestFailedError) and all(isinstance(why, _IMPOSSIBLE) for why in error.reasons.values()):
        return ApiError(400, str(error), code="request_failed")
    if isinstance(error, EngineDeadError):
        return ApiError(500, str(error), code="engine_dead")
    if isinstance(error, SpeContextError):
        return ApiError(500, str(error), code="request_failed")
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "the server made an error; its log says which", code="internal_error")


def note_error(scope: Scope, error: ApiError) -> None:
    """Have a request's line in the log say why it was refused, without words of the conversation."""
    reason = error.detail.partition(": ")[0] if error.quotes else error.detail
    facts = {"reason": reason[:_LONGEST_REASON], "param": error.param, "code": error.code}
    scope.setdefault(FACTS, {}).update({name: value for name, value in facts.items() if value is not None})


def error_body(error: ApiError) -> dict[str, Any]:
    kind = TYPES.get(error.status_code, "server_error" if error.status_code >= 500 else "invalid_request_error")
    return {"error": {"message": error.detail, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """An error as clients of Anthropic's protocol know it."""
    kind = ANTHROPIC_TYPES.get(error.status_code, "api_error" if error.status_code >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.anthropic, "param": error.param, "code": error.code}}


def error_response(error: Exception, scope: Scope) -> Response:
    """The answer to a request, whose path decides how errors look; its line in the log will say why."""
    known = as_api_error(error)
    note_error(scope, known)
    shown = anthropic_error(known) if scope["path"].startswith(ANTHROPIC_PATH) else error_body(known)
    body = json.dumps(shown)  # in ASCII: a message may quote half a character
    headers = dict(known.headers) if known.headers else None
    return Response(body, known.status_code, headers=headers, media_type="application/json")


def install_handlers(app: FastAPI) -> None:
    """Have every error of a route answered in the one form."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(_unknown_path(error, request), request.scope)

    async def handle_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_invalid(error), request.scope)

    app.add_exception_handler(HTTPException, handle)
    app.add_exception_handler(SpeContextError, handle)
    app.add_exception_handler(RequestValidationError, handle_invalid)


def _unknown_path(error: Exception, request: Request) -> Exception:
    """An error for a path or a method that nobody serves, which names what is served; any other error as it is."""
    if isinstance(error, ApiError) or not isinstance(error, HTTPException) or error.status_code not in (404, 405):
        return error
    served = request.app.openapi()["paths"]
    path = request.scope["path"]
    if error.status_code == 405:
        taken = {method for method in (error.headers or {}).get("Allow", "").split(", ") if method}
        methods = ", ".join(sorted(taken | ({"HEAD"} if "GET" in taken else set())))  # what GET answers, HEAD does too
        said = f"{path} does not take {request.method}: use {methods}"
        return ApiError(405, said, code="not_found", headers={"Allow": methods})
    part = next((part for part in path.split("/") if part in NOT_SERVED), None)
    if part is not None:
        return ApiError(404, NOT_SERVED[part], code="not_found")
    return ApiError(404, f"there is no such path here: there are {', '.join(sorted(served))}", code="not_found")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of the things that are wrong with a body."""
    first = _telling(error.errors())
    if first["type"] == "json_invalid":
        place = f" at character {first['loc'][-1]}" if isinstance(first["loc"][-1], int) else ""
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}{place}")
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
    """The first error; where a field may have several types, that of the type which comes closest to the value.

    The deeper inside of a value an error is, the more of the value was as it should be.
    """
    of_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    return max(of_field, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))


def _is_tag(part: str | int) -> bool:
    """Whether a part of an error's place is no field but one of a field's types, such as `str` or `list[TextPart]`."""
    return isinstance(part, str) and (part == "str" or not part.isidentifier() or part[0].isupper())
