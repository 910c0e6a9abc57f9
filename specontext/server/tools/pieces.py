"""What an answer is made of, once calls of tools are told from its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Text:
    """More of the text."""

    text: str


@dataclass(frozen=True)
class Thought:
    """More of the thinking, where it is a part of the form of calls."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call begins; the pieces until the next one are about it."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments of the call that began last: JSON, as the model wrote it."""

    text: str


Piece = Text | Thought | CallBegin | CallArguments


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        parameters: the JSON schema of its arguments, an object.
        strict: arguments must follow the schema.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    strict: bool = False


class Reader(Protocol):
    """Reads one output. However the text is cut, the sums of what comes out are the same."""

    def feed(self, text: str) -> list[Piece]:
        """Take more text; what is certain by now."""

    def finish(self) -> list[Piece]:
        """The output has ended; what is left."""


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece, and nothing empty."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, CallBegin):
            found.append(piece)
        elif not piece.text:
            continue
        elif last is not None and not isinstance(last, CallBegin) and type(last) is type(piece):
            found[-1] = type(piece)(last.text + piece.text)
        else:
            found.append(piece)
    return found
