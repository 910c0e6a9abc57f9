"""Tell a model's thinking from its answer while the text arrives.

Models that reason write `<think> ... </think>` before the answer; the chat templates of some already end with `<think>`.
"""

from __future__ import annotations

from typing import NamedTuple

BEGIN, END = "<think>", "</think>"


class Pieces(NamedTuple):
    """New text of the thinking and of the answer."""

    reasoning: str
    content: str


def starts_inside(parser: str, prompt_end: str, *, continued: bool = False) -> bool:
    """Whether an output begins with thinking although it does not say so.

    Args:
        prompt_end: text of the last tokens of the prompt.
        continued: the prompt ends amid a message of the assistant, which may have begun to think; else with what the chat
            template puts before an answer, where only a mark at the very end counts: others are somebody's words.
    """
    end = prompt_end.rstrip()
    opened, closed = (end.rfind(BEGIN), end.rfind(END)) if continued else (end.endswith(BEGIN), end.endswith(END))
    if opened == closed:  # neither
        return parser == "deepseek_r1"  # R1 always thinks first
    return opened > closed


class ReasoningParser:
    """Splits one output, piece by piece.

    What could be the beginning of a mark, or white space beside one, waits for what follows. However the text is cut into
    pieces, the sums of what is returned are the same.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._can_begin = True  # an opening mark is one only in front of everything else
        self._held = ""
        self._strip = True  # white space at the beginning of a part is no part of it

    def feed(self, text: str, *, last: bool = False) -> Pieces:
        """Take more text; `last` releases what is held."""
        self._held += text
        reasoning = content = ""
        if self._can_begin:
            self._open(last)
        if not self._can_begin and self._inside:
            reasoning = self._think(last)
        if not self._can_begin and not self._inside:
            content = self._answer()
        return Pieces(reasoning, content)

    def _open(self, last: bool) -> None:
        """Decide whether the text begins with the opening mark."""
        ahead = self._held.lstrip()
        if ahead.startswith(BEGIN):
            self._held, self._inside, self._can_begin = ahead[len(BEGIN) :], True, False
        elif last or not BEGIN.startswith(ahead):
            self._can_begin = False
            self._strip = self._inside  # an answer without thinking keeps its white space

    def _think(self, last: bool) -> str:
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held
        place = self._held.find(END)
        if place >= 0:
            thought, self._held = self._held[:place].rstrip(), self._held[place + len(END) :]
            self._inside, self._strip = False, True
            return thought
        if last:
            thought, self._held = self._held, ""
            return thought
        keep = len(self._held) - len(_without_start_of(END, self._held).rstrip())
        thought, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return thought

    def _answer(self) -> str:
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held
        answer, self._held = self._held, ""
        return answer


def _without_start_of(mark: str, text: str) -> str:
    """`text` without an end that could be the beginning of `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-length:]):
            return text[:-length]
    return text
