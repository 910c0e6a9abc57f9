"""Which token ids a model can read: those that have a row in its embedding.

A tokenizer may know more tokens than that, after tokens were added to it and not to the model. Such an id reads past the end of
the embedding, which on a GPU ends the process; so ids are checked before they come to a model, whoever made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specontext.errors import shown

_MOST = 1 << 31  # larger ids do not fit what tokenizers count with


def unknown_token(ids: Sequence[object], rows: int, tokenizer: Any) -> str | None:
    """What is wrong with the first of these ids that the model cannot read; None where it can read all.

    Args:
        rows: of the model's embedding; ids from 0 to `rows - 1` can be read.
        tokenizer: tells the text of a token that it knows and the model does not.
    """
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < rows:  # type: ignore[type-var, operator]
        return None  # which is the rule, and told in a third of the time
    place = next((i for i, t in enumerate(ids) if type(t) is not int or not 0 <= t < rows), None)
    if place is None:
        return None
    wrong = ids[place]
    if type(wrong) is not int:
        return f"{shown(wrong)} is not a token id: give Python integers, 0 .. {rows - 1}"
    text = _text(tokenizer, wrong)
    if text is None:
        return f"{shown(wrong)} is not a token id of this model: its vocabulary is 0 .. {rows - 1}"
    return (
        f"token {wrong} ({shown(text)}) is in the tokenizer and not in the model, whose embedding has the {rows} rows "
        f"0 .. {rows - 1}: leave it out, or resize the model's embedding to its tokenizer (resize_token_embeddings) and save both"
    )


def _text(tokenizer: Any, token: int) -> str | None:
    """The text of a token, None where the tokenizer does not know it."""
    if not 0 <= token < _MOST:
        return None
    try:
        text = tokenizer.convert_ids_to_tokens(token)
        known = isinstance(text, str) and tokenizer.convert_tokens_to_ids(text) == token  # some answer <unk> for what they lack
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return text if known else None
