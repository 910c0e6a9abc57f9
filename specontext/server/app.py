"""The ASGI application over one engine."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from specontext import __version__
from specontext.server.body_limit import BodyLimit
from specontext.server.errors import install_handlers
from specontext.server.middleware import ApiKeys, HeadAsGet, PlainPath, RequestId
from specontext.server.routes import chat, completions, messages, models, operations, responses, tokens
from specontext.server.settings import ServerConfig
from specontext.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The application; the engine must have been started when the first request comes."""
    app = FastAPI(
        title="SpeContext",
        version=__version__,
        description="Long-context inference behind the API of OpenAI.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # clients may drop their key on the way
        middleware=guards(
            state.config, log=not state.config.disable_log_requests, refused=lambda code: state.metrics.refused(code)
        ),
    )
    app.state.server = state
    install_handlers(app)
    for routes in (chat, completions, responses, messages, models, tokens, operations):
        app.include_router(routes.router)
    return app


def guards(config: ServerConfig, *, log: bool, refused: Callable[[str], None]) -> list[Middleware]:
    """What stands before the routes, the outermost first.

    Args:
        log: write a line for every request.
        refused: told of each request that is answered with an error, by its code.
    """
    across = [
        Middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_credentials=config.allow_credentials,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            expose_headers=("x-request-id", "retry-after"),
        )
    ]
    return [
        Middleware(PlainPath),
        *(across if config.allowed_origins else ()),  # outside of the keys, which browsers do not send when they ask
        Middleware(RequestId, log=log, refused=refused),
        Middleware(ApiKeys, keys=config.api_key),
        Middleware(BodyLimit, most=config.max_body_size, seconds=config.receive_timeout),
        Middleware(HeadAsGet),
    ]
