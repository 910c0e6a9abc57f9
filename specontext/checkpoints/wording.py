"""What a library's exception says, as one sentence with its advice."""

from __future__ import annotations

import re

LONGEST = 1500  # characters; longer messages list hundreds of names
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# Lists of every class that a library knows, and ways round a safety check that are not ours to offer.
NOISE = (
    re.compile(r"Model type should be one of [^.]*\.?"),
    re.compile(r",? or contain one of the following strings in its name: [^.]*"),
    re.compile(r"Checkout 'https://huggingface\.co/[/.][^']*' for available files\.?"),  # of a directory
    re.compile(r"(This file can still be loaded, to do so|In PyTorch 2\.6, we changed the default).*?(?=WeightsUnpickler error)"),
    re.compile(r"WeightsUnpickler error:(?=[\s.]*$)"),
    re.compile(r"Please use `torch\.serialization\.add_safe_globals.*?if you trust this class/function\."),
    re.compile(r"Check the documentation of torch\.load to learn more .*$"),
)
SPEAKS_FOR_ITSELF = (OSError, ValueError, RuntimeError, ImportError)


def in_one_sentence(error: BaseException) -> str:
    """The message of an exception with its lines joined, terminal colours and lists of everything a library knows left out.

    The name of the exception's class goes before messages that mean nothing without it, as those of KeyError and
    AttributeError.
    """
    text = _joined(ANSI.sub("", str(error)))
    for noise in NOISE:
        text = noise.sub("", text)
    text = re.sub(r"\s+", " ", text).strip().removesuffix(".")
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    own = type(error).__module__ == "builtins" and not isinstance(error, SPEAKS_FOR_ITSELF)
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text}" if own else text


def first_few(names: list[str]) -> str:
    """Three of the names and how many there are beside."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _joined(text: str) -> str:
    """Lines in a row, with a full stop where one sentence ends without it and the next begins."""
    joined = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if joined and joined[-1].isalnum() and line[0].isupper():
            joined += "."
        joined += f" {line}"
    return joined.strip()
