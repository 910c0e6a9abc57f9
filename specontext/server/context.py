"""What belongs to one HTTP request while it is served: the server's state, an id, and facts for its line in the log."""

from __future__ import annotations

from typing import Any, cast

from fastapi import Request

from specontext.server.facts import FACTS
from specontext.server.state import ServerState


def state_of(request: Request) -> ServerState:
    return cast(ServerState, request.app.state.server)


def note(request: Request, **facts: Any) -> None:
    """Add facts to the request's line in the log."""
    request.scope.setdefault(FACTS, {}).update(facts)
