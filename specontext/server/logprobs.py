"""Log-probabilities in the two dialects: lists of objects for chat, parallel lists for text completions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specontext.server.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from specontext.server.protocol.completion import CompletionLogprobs
from specontext.server.token_text import TokenTexts

_LOWEST = -9999.0  # JSON has no minus infinity

Table = dict[int, float]


def chat_logprobs(token_ids: Sequence[int], tables: Sequence[Table], top: int, texts: TokenTexts) -> ChatLogprobs:
    """Each token with its `top` likeliest alternatives."""
    content = []
    for token, table in zip(token_ids, tables, strict=True):
        likeliest = [_top(other, value, texts) for other, value in _likeliest(table, top)]
        own = _top(token, table[token], texts)
        content.append(TokenLogprob(**own.model_dump(), top_logprobs=likeliest))
    return ChatLogprobs(content=content)


def completion_logprobs(
    token_ids: Sequence[int], tables: Sequence[Table], top: int, texts: TokenTexts, *, offset: int
) -> CompletionLogprobs:
    """Parallel lists over the tokens of an output.

    Args:
        offset: place of the first token in the text of the choice.
    """
    found = _nothing()
    for token, table in zip(token_ids, tables, strict=True):
        _append(found, token, table, top, texts, offset)
        offset += len(found.tokens[-1])
    return found


def echo_logprobs(
    token_ids: Sequence[int], tables: Sequence[Table | None], top: int, texts: TokenTexts, *, echo: str
) -> CompletionLogprobs:
    """Parallel lists over the tokens of a prompt, whose text is `echo`; there is no log-probability of the first one."""
    found, offset = _nothing(), 0
    for token, table in zip(token_ids, tables, strict=True):
        _append(found, token, table, top, texts, min(offset, len(echo)))
        text = found.tokens[-1]
        if not texts.is_added(token) or echo.startswith(text, offset):  # else the tokenizer put it there
            offset += len(text)
    return found


def _nothing() -> CompletionLogprobs:
    return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


def _append(found: CompletionLogprobs, token: int, table: Table | None, top: int, texts: TokenTexts, offset: int) -> None:
    text = texts.text_of(token)
    found.tokens.append(text)
    found.text_offset.append(offset)
    if table is None:
        found.token_logprobs.append(None)
        found.top_logprobs.append(None)
        return
    likeliest: dict[str, float] = {}
    for other, value in [*_likeliest(table, top), (token, table[token])]:
        likeliest.setdefault(texts.text_of(other), _finite(value))  # different tokens may have one text
    found.token_logprobs.append(_finite(table[token]))
    found.top_logprobs.append(likeliest)


def _likeliest(table: Table, top: int) -> list[tuple[int, float]]:
    return sorted(table.items(), key=lambda item: -item[1])[:top]


def _top(token: int, value: float, texts: TokenTexts) -> TopLogprob:
    return TopLogprob(token=texts.text_of(token), logprob=_finite(value), bytes=list(texts.bytes_of(token)))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LOWEST
