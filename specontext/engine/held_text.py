"""Text that waits until what follows has decided what it is."""

from __future__ import annotations


class HeldText:
    """What waits. Blanks that keep coming behind blanks are collected unseen: they cost no more than their length."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._blank = False  # all of them are

    def __str__(self) -> str:
        return "".join(self._parts)

    def more(self, text: str) -> str | None:
        """What waits, with `text` behind it; None where blanks only followed blanks, which decides nothing and is kept."""
        if self._blank and text.isspace():
            self._parts.append(text)
            return None
        return "".join((*self._parts, text))

    def keep(self, text: str) -> None:
        """Have this wait, and nothing else."""
        self._parts, self._blank = [text], text.isspace()


def without_start_of(mark: str, text: str) -> str:
    """`text` without an end that could be the beginning of `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-length:]):
            return text[:-length]
    return text
