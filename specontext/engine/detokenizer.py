"""Text of an output while its tokens arrive, and the strings that end it.

What is shown is never taken back: characters whose bytes are not complete and text that could become a stop string are held until
the next tokens decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specontext.core import SamplingParams
from specontext.engine.thinking import ThinkingReader

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character, or none yet
_CONTEXT = 6  # tokens of the prompt that are decoded in front of the first output token
_CHARACTER = 4  # tokens of a character at most: its bytes
_PATIENCE = 2 * _CHARACTER  # more undecided tokens than this must be invalid bytes


class Detokenizer:
    """Text of one output, token by token, at a cost that does not grow with its length.

    Without stop strings tokens are decoded when the text is asked for, which may be while the next step computes.

    Each new token is decoded behind the last tokens that gave text, since decoders in the manner of SentencePiece drop the space
    of whatever comes first. The text of the whole output is `decode(output)`, but it keeps such a space, because a prompt goes
    before it.

    A stop string is met as if the text were read character by character: the occurrence that is complete first ends the output,
    of several at once the one that began first. Occurrences within the first `min_tokens` tokens do not count.

    Where the thinking is told from the answer, all this is about the answer.

    Attributes:
        stop: the stop string that was met, or None.
        thinking: splits off the thinking, where that was asked for.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        """`tokenizer` is a Hugging Face tokenizer; of the prompt only the last few tokens are looked at."""
        self.stop: str | None = None
        self.thinking = ThinkingReader(params.thinking) if params.thinking is not None else None
        self._text = ""
        self._unread: list[int] = []
        self._tokenizer = tokenizer
        self._params = params
        self._stops = tuple(params.stop)
        self._longest_stop = max(map(len, self._stops), default=0)
        self._full = ""  # all decoded text, with what is held back
        self._count = 0
        self._pending: list[int] = []  # tokens whose text is undecided
        # Tokens decoded in front of the pending ones; they never end inside a character.
        self._context, self._context_text = self._last_text(prompt_token_ids)

    def append(self, token_ids: Sequence[int]) -> bool:
        """Takes the next output tokens. Returns whether a stop string was met; tokens after it change nothing."""
        self._unread += token_ids
        if self._stops:
            self._read()
        return self.stop is not None

    @property
    def text(self) -> str:
        """Complete text that may be shown: a prefix of the final text."""
        self._read()
        return self._text

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for token in unread:
            if self.stop is not None:
                break
            self._count += 1
            if self.thinking is None or not self._take_mark(self.thinking, token):
                self._pending.append(token)
                self._accept(self._settled())

    def _take_mark(self, thinking: ThinkingReader, token: int) -> bool:
        """Tell the reader of the thinking about a token; whether it is a mark, which gives no text."""
        thinking.count(self._count)
        if not thinking.awaits(token):
            return False
        self._accept(self._delta(self._pending))  # a mark ends the character before it
        self._pending = []
        return thinking.take(token)

    def finish(self) -> str:
        """Releases everything held back, for an output that ended by its length or an end token. Returns the final text."""
        self._read()
        if self.stop is None:
            self._accept(self._delta(self._pending), last=True)
            self._pending = []
        if self.stop is None:
            self._text = self._full
        return self._text

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._params.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _last_text(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
        """Some of the prompt's last tokens that are whole characters, and their text; nothing where there are none."""
        size = len(prompt_token_ids)
        best: tuple[list[int], str] = ([], "")
        for end in range(size, max(0, size - _CHARACTER), -1):
            for begin in range(max(0, end - _CONTEXT), end):
                tokens = list(prompt_token_ids[begin:end])
                text = self._decode(tokens)
                if text and _REPLACEMENT not in text:
                    return tokens, text
                if not text and not best[0]:
                    best = tokens, text  # a lone space, which the decoder drops, or special tokens
        return best

    def _delta(self, token_ids: list[int]) -> str:
        """Text that these tokens add behind the context."""
        if not token_ids:
            return ""
        text = self._decode(self._context + token_ids)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(token_ids)  # byte-fallback decoders let an invalid byte spoil the valid ones before it

    def _settled(self) -> str:
        """Text of the pending tokens as far as no later token can change it; these tokens become the context."""
        delta = self._delta(self._pending)
        if not delta.endswith(_REPLACEMENT):
            self._move_context(len(self._pending), delta)
            return delta
        if len(self._pending) <= _PATIENCE:
            return ""
        # Invalid bytes. Where both sides of a cut decode to the same text as the whole, no character spans the cut.
        for cut in range(len(self._pending) - 1, 0, -1):
            head = self._delta(self._pending[:cut])
            tail = self._decode(self._pending[cut:])
            if tail and head + tail == delta:
                self._move_context(cut, head)
                return head
        return ""

    def _move_context(self, count: int, delta: str) -> None:
        """Turns the first pending tokens, whose text is `delta`, into the context."""
        settled, self._pending = self._pending[:count], self._pending[count:]
        if delta:
            self._context = settled
        elif not self._context_text:
            self._context = (self._context + settled)[-_CONTEXT:]
        else:
            return  # skipped special tokens: the text before them is still what the next token follows
        self._context_text = self._decode(self._context)

    def _accept(self, delta: str, *, last: bool = False) -> None:
        """Appends decoded text, looks for stop strings in it and decides how much may be shown."""
        if self.thinking is not None:
            delta = self.thinking.feed(delta, last=last)
        if not delta:
            return
        start = len(self._full)
        self._full += delta
        if self._count > self._params.min_tokens and (found := self._find_stop(start)):
            begin, self.stop = found
            self._text = self._full[: begin + len(self.stop) if self._params.include_stop_str_in_output else begin]
        else:
            held = self._held()
            self._text = self._full[:-held] if held else self._full

    def _find_stop(self, start: int) -> tuple[int, str] | None:
        """Begin and string of the first occurrence that ends behind `start`."""
        found = []
        for stop in self._stops:
            begin = self._full.find(stop, max(0, start + 1 - len(stop)))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        if not found:
            return None
        _, begin, stop = min(found)
        return begin, stop

    def _held(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string and would be cut off with it."""
        if self._params.include_stop_str_in_output:
            return 0
        for length in range(min(self._longest_stop - 1, len(self._full)), 0, -1):
            tail = self._full[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
