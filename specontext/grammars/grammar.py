"""Grammars compiled over a vocabulary, and the state of one output in one of them."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer


class GrammarState:
    """How far one output has come in its grammar.

    Attributes:
        matcher: the library's, which takes tokens, fills masks, and knows whether anything can follow.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: LLTokenizer) -> None:
        self.matcher, self._vocabulary = matcher, vocabulary

    @property
    def error(self) -> str:
        """What went wrong, such as a grammar that became too complex for its limits; '' for nothing."""
        return " ".join(str(self.matcher.get_error()).removesuffix("<non-verbose/>").split())

    def accept_text(self, text: str) -> bool:
        """Take text that came in the middle of a token; whether all of it was allowed."""
        tokens: Sequence[int] = self._vocabulary.greedy_tokenize(text)
        return bool(self.matcher.consume_tokens(list(tokens)))


class Grammar:
    """A compiled grammar; each output that follows it has a state of its own."""

    def __init__(self, matcher: LLMatcher, vocabulary: LLTokenizer) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    @property
    def mask_words(self) -> int:
        """Length of a mask, in words of 32 bits."""
        return -(-int(self._vocabulary.vocab_size) // 32)

    def begin(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy(), self._vocabulary)
