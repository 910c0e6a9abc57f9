"""The one endpoint of all replicas: reads requests, has a replica chosen, and hands its answer on as it comes."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specontext.integrations.ray_serve.call import Call, plain_scope
from specontext.integrations.ray_serve.merging import merged_metrics, merged_status
from specontext.integrations.ray_serve.prefixes import prefix_marks
from specontext.integrations.ray_serve.settings import DeployConfig
from specontext.server.app import guards
from specontext.server.bounded_body import check_structure
from specontext.server.errors import RETRY_AFTER, ApiError, anthropic_error, as_api_error, error_body
from specontext.server.logs import configure_logging
from specontext.server.streaming import DONE, event, named_event, unless_client_leaves

logger = logging.getLogger("specontext.server")

_PATIENCE = 5.0  # seconds that all replicas together have to say how they are


class Ingress:
    """An ASGI application over the replicas.

    Args:
        replicas: Ray Serve's handle on them.
    """

    def __init__(self, replicas: DeploymentHandle, config: DeployConfig) -> None:
        configure_logging()
        self._replicas = replicas
        # The handle was made by a process that may know nothing of gRPC.
        self._answer = replicas.options(method_name="answer", stream=True, _by_reference=False)
        app: ASGIApp = self._serve
        for guard in reversed(guards(config, log=False, refused=lambda code: None)):  # replicas write the lines of requests
            app = guard.cls(app, *guard.args, **guard.kwargs)
        self._guarded = app

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _UnderRay(self._guarded)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] == "GET" and path in ("/health", "/metrics", "/status"):
            await (await self._of_all(path))(scope, receive, send)
            return
        body = await _whole_body(receive)
        call = await self._call(scope, body)
        await unless_client_leaves(receive, self._hand_on(call, send))

    async def _of_all(self, path: str) -> Response:
        """What only all replicas together can answer."""
        if path == "/health":
            return Response(status_code=200 if any(await self._ask("living")) else 503, media_type="text/plain")
        found = dict(await self._ask(path[1:]))
        if not found:
            raise _no_replica()
        if path == "/metrics":
            return Response(merged_metrics(found), media_type=CONTENT_TYPE_LATEST)
        return Response(json.dumps(merged_status(found, time.perf_counter())), media_type="application/json")

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        """What the replicas answer that answer at all."""
        try:
            response = self._replicas.broadcast(method, *args)
            found = await response.results_async(timeout_s=_PATIENCE, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [each for each in found if not isinstance(each, BaseException)]

    async def _call(self, scope: Scope, body: bytes) -> Call:
        """A request with what a replica is chosen by; bodies that are not JSON are for the replica to refuse."""
        plain = plain_scope(scope)
        if not body:
            return Call(plain, body)
        check_structure(body)
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return Call(plain, body)
        replica = None
        if scope["path"] == "/v1/responses" and (names := _earlier(parsed)):
            replica = next((name for name in await self._ask("holding", names) if name is not None), None)
        return Call(plain, body, prefix_marks(parsed), replica)

    async def _hand_on(self, call: Call, send: Send) -> None:
        """Send what a replica answers; what ends it early is answered, or is the last event of a stream."""
        stream = self._answer.remote(call)
        begun: Message | None = None
        ended = False
        try:
            async for messages in stream:
                for message in messages:
                    begun = begun or message
                    ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))
                    await send(message)
        except Exception as error:
            if ended:  # the answer was whole
                return
            known = _failure(error)
            if begun is None:
                raise known from error
            if not _is_event_stream(begun):
                raise  # what was promised cannot be kept: the connection is cut
            await send({"type": "http.response.body", "body": _last_event(call.scope["path"], known), "more_body": False})
        finally:
            if not ended:
                stream.cancel()


class _UnderRay:
    """Leaves start, end and the names of requests to Ray, which also writes these into answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [each for each in message["headers"] if each[0].lower() != b"x-request-id"]}
            await send(message)

        if scope["type"] != "lifespan":
            return await self._app(scope, receive, send_unnamed)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _whole_body(receive: Receive) -> bytes:
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return b"".join(parts)


def _earlier(body: Any) -> list[str]:
    """Names of answers, and of items of answers, that a request goes on from."""
    if not isinstance(body, dict):
        return []
    items = body["input"] if isinstance(body.get("input"), list) else []
    found = [body.get("previous_response_id")]
    found += [item.get("id") for item in items if isinstance(item, dict) and item.get("type") in ("item_reference", None)]
    return [name for name in found if isinstance(name, str)]


def _no_replica() -> ApiError:
    return ApiError(503, "no replica is ready: try again in a while", code="no_replica", headers={"Retry-After": RETRY_AFTER})


def _failure(error: Exception) -> ApiError:
    """What a failure between here and the replica means to a client."""
    if isinstance(error, RayActorError):
        logger.warning("a replica was lost while it answered: %s", type(error).__name__)
        return ApiError(
            503,
            "the replica that answered this request is gone: send it again",
            code="replica_lost",
            headers={"Retry-After": RETRY_AFTER},
        )
    if isinstance(error, BackPressureError):
        return ApiError(
            429, "the queues of all replicas are full: try again later", code="queue_full", headers={"Retry-After": RETRY_AFTER}
        )
    return _no_replica() if isinstance(error, DeploymentUnavailableError) else as_api_error(error)


def _is_event_stream(start: Message) -> bool:
    kinds = [value for name, value in start.get("headers", ()) if name.lower() == b"content-type"]
    return any(kind.startswith(b"text/event-stream") for kind in kinds)


def _last_event(path: str, error: ApiError) -> bytes:
    """An error as the protocol of a path has it at the end of a stream."""
    if path.startswith("/v1/messages"):
        return named_event(anthropic_error(error))
    if path.startswith("/v1/responses"):
        return named_event({"type": "error", "code": error.code, "message": error.detail, "param": error.param})
    return event(error_body(error)) + DONE
