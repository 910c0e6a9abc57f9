"""Rows of JSONL and Parquet files and of data sets as documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specontext.distill.data.chat import conversation
from specontext.distill.data.documents import Document, marked, plain
from specontext.distill.data.encoder import Encoder, UnknownTokenError
from specontext.distill.data.source import DataError
from specontext.models.token_ids import unknown_token

COMPLETIONS = ("completion", "response", "output")
UNDERSTOOD = (
    "'text'; 'prompt' with 'completion', 'response' or 'output'; 'messages' (a list of {role, content}); "
    "'input_ids' (with 'wanted' or without)"
)


def document(row: object, encoder: Encoder, where: str) -> Document:
    """The document of a row, by the first of these that it has: `input_ids`, `messages`, `prompt` and a completion, `text`.

    A text is said by the model as a whole. Of a prompt with its completion the completion and the end are, of a
    conversation the assistant's parts. `input_ids` are taken as they are, with `wanted` marking the positions whose next token
    has to be said (after the last one that is the end); without `wanted` all are. Other keys of a row are its own affair.

    Args:
        where: names the row in errors.

    Raises:
        DataError: a row that has none of these, a value of the wrong kind, or a token that the model cannot read.
    """
    try:
        return _document(row, encoder, where)
    except UnknownTokenError as error:
        raise DataError(f"{where}: {error}") from error


def _document(row: object, encoder: Encoder, where: str) -> Document:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is {type(row).__name__}, not an object; understood are rows with {UNDERSTOOD}")
    if "input_ids" in row:
        return _tokens(row, encoder, where)
    if "messages" in row:
        return conversation(row["messages"], encoder, where, tools=row.get("tools"))
    completion = next((key for key in COMPLETIONS if key in row), None)
    if "prompt" in row and completion is not None:
        return _completed(_string(row, "prompt", where), _string(row, completion, where), encoder, where)
    if "text" in row:
        return plain(_string(row, "text", where), encoder)
    keys = ", ".join(map(repr, row)) or "no keys"
    raise DataError(f"{where} has {keys}; understood are rows with {UNDERSTOOD}")


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"'{key}' of {where} must be a string, got {type(row[key]).__name__}")
    return row[key]


def _completed(prompt: str, completion: str, encoder: Encoder, where: str) -> Document:
    if not completion:
        raise DataError(f"{where} has an empty completion: nothing of it could be learned")
    text = prompt + completion
    ids, said = encoder.marked(text, [(len(prompt), len(text))])
    if encoder.eos is not None and ids[-1:] != [encoder.eos]:
        ids, said = [*ids, encoder.eos], [*said, True]
    return marked([*encoder.opening, *ids], [False] * len(encoder.opening) + said, encoder.opening)


def _tokens(row: Mapping[str, Any], encoder: Encoder, where: str) -> Document:
    ids, wanted = row["input_ids"], row.get("wanted")
    if not isinstance(ids, list):
        raise DataError(f"'input_ids' of {where} must be a list of token ids, got {type(ids).__name__}")
    size = len(encoder.tokenizer) if encoder.vocab_size is None else encoder.vocab_size
    if (wrong := unknown_token(ids, size, encoder.tokenizer)) is not None:
        raise DataError(f"'input_ids' of {where}: {wrong}")
    if wanted is None:
        wanted = [True] * len(ids)
    elif not isinstance(wanted, list) or len(wanted) != len(ids) or any(mark not in (0, 1) for mark in wanted):
        raise DataError(f"'wanted' of {where} must be a list of {len(ids)} values true or false, one for each of 'input_ids'")
    if ids and not any(wanted):
        raise DataError(f"{where} has no wanted position: nothing of it could be learned")
    said = [False, *map(bool, wanted)]
    if ids and said[-1] and encoder.eos is not None:
        ids = [*ids, encoder.eos]
    return marked(ids, said[: len(ids)], encoder.opening)
