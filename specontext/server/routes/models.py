"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter, Request

from specontext.server.context import state_of
from specontext.server.protocol.common import ERROR_RESPONSES
from specontext.server.protocol.others import Model, ModelList
from specontext.server.state import ServerState

router = APIRouter()


def _model(state: ServerState, name: str) -> Model:
    return Model(
        id=name,
        created=int(state.started),
        owned_by="specontext",
        root=state.root,
        weights=state.weights_note,
        max_model_len=state.max_model_len,
    )


@router.get("/v1/models", responses=ERROR_RESPONSES)
async def models(request: Request) -> ModelList:
    """The model, once for each of its names."""
    state = state_of(request)
    return ModelList(data=[_model(state, name) for name in state.names])


@router.get("/v1/models/{name:path}", responses=ERROR_RESPONSES)
async def model(request: Request, name: str) -> Model:
    """The model by one of its names."""
    state = state_of(request)
    state.check_model(name)
    return _model(state, name)
