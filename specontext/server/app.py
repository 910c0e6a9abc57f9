"""The ASGI application over one engine."""

from __future__ import annotations

from fastapi import FastAPI

from specontext import __version__
from specontext.server.errors import install_handlers
from specontext.server.middleware import ApiKeys, BodyLimit, RequestId
from specontext.server.routes import chat, completions, models, operations, tokens
from specontext.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The application; the engine must have been started when the first request comes."""
    app = FastAPI(
        title="SpeContext",
        version=__version__,
        description="Long-context inference behind the API of OpenAI.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.server = state
    install_handlers(app)
    for routes in (chat, completions, models, tokens, operations):
        app.include_router(routes.router)
    # The last one that is added is the outermost.
    app.add_middleware(BodyLimit, most=state.config.max_body_size)
    app.add_middleware(ApiKeys, keys=state.config.api_key)
    app.add_middleware(RequestId, log=not state.config.disable_log_requests)
    return app
