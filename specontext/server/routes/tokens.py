"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request

from specontext.server.bounded_body import BoundedRoute
from specontext.server.context import state_of
from specontext.server.prompts import over_length
from specontext.server.protocol.common import ERROR_RESPONSES
from specontext.server.protocol.others import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChat,
    TokenizeRequest,
    TokenizeResponse,
)

router = APIRouter(route_class=BoundedRoute)


@router.post("/tokenize", responses=ERROR_RESPONSES)
async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
    """Token ids of a text, or of a conversation in the chat template."""
    state = state_of(request)
    state.check_model(body.model)
    if isinstance(body, TokenizeChat):
        ids = (await state.encoder.messages(body, add_special_tokens=body.add_special_tokens)).token_ids
    else:
        ids = await state.encoder.text(body.prompt, add_special_tokens=body.add_special_tokens)
    if body.return_token_strs and len(ids) > state.max_model_len:
        raise over_length(f"return_token_strs is for at most as many, and these are {len(ids)}", state.max_model_len)
    strings = [state.texts.text_of(token) for token in ids] if body.return_token_strs else None
    return TokenizeResponse(count=len(ids), max_model_len=state.max_model_len, tokens=ids, token_strs=strings)


@router.post("/detokenize", responses=ERROR_RESPONSES)
async def detokenize(request: Request, body: DetokenizeRequest) -> DetokenizeResponse:
    """Text of token ids."""
    state = state_of(request)
    state.check_model(body.model)
    if len(body.tokens) > state.max_model_len:
        raise over_length(f"there are {len(body.tokens)} tokens: send fewer", state.max_model_len)
    return DetokenizeResponse(prompt=await state.encoder.decode(body.tokens))
