"""The ASGI application over one engine."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from specontext import __version__
from specontext.server.errors import install_handlers
from specontext.server.middleware import ApiKeys, BodyLimit, HeadAsGet, PlainPath, RequestId
from specontext.server.routes import chat, completions, messages, models, operations, responses, tokens
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
    )
    app.state.server = state
    install_handlers(app)
    for routes in (chat, completions, responses, messages, models, tokens, operations):
        app.include_router(routes.router)
    config = state.config
    # The last one that is added is the outermost.
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, most=config.max_body_size)
    app.add_middleware(ApiKeys, keys=config.api_key)
    app.add_middleware(RequestId, log=not config.disable_log_requests, refused=lambda code: state.metrics.refused(code))
    if config.allowed_origins:  # outside of the keys, which browsers do not send when they ask whether they may
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_credentials=config.allow_credentials,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            expose_headers=("x-request-id", "retry-after"),
        )
    app.add_middleware(PlainPath)
    return app
