"""Tell a model's thinking from its answer while the text arrives.

Models that reason write `<think> ... </think>` before the answer; the chat templates of some already end with `<think>`.
"""

from __future__ import annotations

from specontext.engine.held_text import HeldText, without_start_of
from specontext.sampling_params import Thinking


class ThinkingReader:
    """Splits one output, piece by piece.

    What could be the beginning of a mark, or white space beside one, waits for what follows. However the text is cut into
    pieces, the sums of what is returned are the same. A mark that is one token is met by its token, which may give no text.

    Attributes:
        pieces: the thinking so far, which is only appended to.
        tokens: how many tokens it has, with its marks.
    """

    def __init__(self, thinking: Thinking) -> None:
        self.pieces: list[str] = []
        self.tokens = 0
        self._marks, self._inside = thinking, thinking.inside
        self._can_begin = True  # an opening mark is one only in front of everything else
        self._held = ""
        self._waiting = HeldText()  # between two pieces, what is held
        self._strip = True  # white space at the beginning of a part is no part of it
        self._seen = 0

    @property
    def text(self) -> str:
        """The pieces in one."""
        return "".join(self.pieces)

    @property
    def over(self) -> bool:
        """Whether all that follows belongs to the answer."""
        return not self._can_begin and not self._inside

    def count(self, tokens: int) -> None:
        """Take note of how many tokens the output has, before what the last of them says is fed."""
        self._seen = tokens
        if self._inside:
            self.tokens = tokens

    def awaits(self, token: int) -> bool:
        """Whether a token could be a mark, so that all text before it must be fed now."""
        return (self._can_begin and token == self._marks.begin_id) or (self._inside and token == self._marks.end_id)

    def take(self, token: int) -> bool:
        """Whether a token that was awaited is a mark."""
        if self._inside and token == self._marks.end_id:
            self._close(str(self._waiting))
            self._held = ""
            self._waiting.keep("")
            return True
        if self._can_begin and token == self._marks.begin_id and not str(self._waiting).strip():
            self._begin("")
            self._waiting.keep("")
            return True
        return False

    def feed(self, text: str, *, last: bool = False) -> str:
        """Take more text, of which what belongs to the answer is returned; `last` releases what is held."""
        held = self._waiting.more(text)
        if held is None and not last:
            return ""
        self._held = str(self._waiting) if held is None else held
        if self._can_begin:
            self._open(last)
        if not self._can_begin and self._inside:
            self._think(last)
        answer = self._answer() if self.over else ""
        self._waiting.keep(self._held)
        return answer

    def _open(self, last: bool) -> None:
        """Decide whether the text begins with the opening mark."""
        ahead, mark = self._held.lstrip(), self._marks.begin if self._marks.begin_id is None else ""
        if mark and ahead.startswith(mark):
            self._begin(ahead[len(mark) :])
        elif last or not mark.startswith(ahead):
            self._can_begin = False
            self._strip = self._inside  # an answer without thinking keeps its white space

    def _begin(self, rest: str) -> None:
        self._held, self._inside, self._can_begin, self.tokens = rest, True, False, self._seen

    def _close(self, thought: str) -> None:
        self._think_on((thought.lstrip() if self._strip else thought).rstrip())
        self._inside, self._can_begin, self._strip = False, False, True

    def _think(self, last: bool) -> None:
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held
        mark = self._marks.end if self._marks.end_id is None else ""
        place = self._held.find(mark) if mark else -1
        if place >= 0:
            thought, self._held = self._held[:place], self._held[place + len(mark) :]
            self._close(thought)
            return
        sure = len(self._held) if last else len(without_start_of(mark, self._held).rstrip())
        self._think_on(self._held[:sure])
        self._held = self._held[sure:]

    def _think_on(self, text: str) -> None:
        if text:
            self.pieces.append(text)

    def _answer(self) -> str:
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held
        answer, self._held = self._held, ""
        return answer
