"""One output on its way through a grammar."""

from __future__ import annotations

from specontext.engine.detokenizer import Detokenizer
from specontext.errors import ConstraintError
from specontext.grammars.grammar import Grammar
from specontext.sampling_params import Thinking


class Constraint:
    """Follows one output; its thinking is free, where that is told apart, and the grammar begins behind it.

    Where the output may begin to think, its first token is one of the grammar or the opening mark, if that is a single token.

    Attributes:
        matcher: the library's, of its grammar.
        may_think: the opening mark's token, where it may come next.
    """

    def __init__(self, grammar: Grammar, thinking: Thinking | None) -> None:
        self.mask_words = grammar.mask_words
        self._state = grammar.begin()
        self.matcher = self._state.matcher
        self._thinks = thinking is not None and thinking.inside
        self.may_think = thinking.begin_id if thinking is not None and not thinking.inside else None

    @property
    def active(self) -> bool:
        """Whether the next token is the grammar's to allow."""
        return not self._thinks

    @property
    def complete(self) -> bool:
        """Whether the output can only end."""
        return not self._thinks and bool(self.matcher.is_stopped())

    def failure(self) -> ConstraintError:
        return ConstraintError(f"the output cannot go on in its grammar: {self._state.error}")

    def accept(self, token: int, detokenizer: Detokenizer) -> None:
        """Take the output's next token, which the detokenizer has taken already.

        Raises:
            ConstraintError: the grammar does not allow it.
        """
        if self._thinks:
            self._end_thinking(detokenizer)
        elif token == self.may_think:
            self._thinks = True
        elif not self.matcher.consume_token(token):
            raise ConstraintError(f"token {token} is not one that the grammar allows here: {self._state.error}")
        self.may_think = None

    def _end_thinking(self, detokenizer: Detokenizer) -> None:
        begun = detokenizer.text.lstrip()  # a mark of several tokens may end inside one, which goes on with the answer
        self._thinks = detokenizer.thinking is None or not detokenizer.thinking.over
        if begun and not self._thinks and not self._state.accept_text(begun):
            raise ConstraintError("the answer began amid the token that ended the thinking, and the grammar does not allow it")
