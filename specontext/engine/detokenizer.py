"""Text of an output while its tokens arrive, and the strings that end it.

What is shown is never taken back: characters whose bytes are not complete and text that could become a stop string are held until
the next tokens decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from specontext.engine.stop_strings import StopStrings
from specontext.engine.thinking import ThinkingReader
from specontext.sampling_params import SamplingParams

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character, or none yet
_CONTEXT = 6  # tokens of the prompt that are decoded in front of the first output token
_CHARACTER = 4  # tokens of a character at most: its bytes
_PATIENCE = 2 * _CHARACTER  # more undecided tokens than this must be invalid bytes
_MOST_PENDING = 4 * _PATIENCE


class Detokenizer:
    """Text of one output, token by token, at a cost that grows neither with its length nor with that of stop strings.

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
        self._pieces: list[str] = []  # text that may be shown
        self._held: deque[str] = deque()  # text behind it that may become a stop string
        self._num_held = 0  # characters of it
        self._unread: list[int] = []
        self._tokenizer = tokenizer
        self._params = params
        self._stops = StopStrings(params.stop) if params.stop else None
        self._count = 0
        self._pending: list[int] = []  # tokens whose text is undecided
        # Tokens decoded in front of the pending ones; they never end inside a character.
        self._context, self._context_text = self._last_text(prompt_token_ids)

    def append(self, token_ids: Sequence[int]) -> bool:
        """Takes the next output tokens. Returns whether a stop string was met; tokens after it change nothing."""
        self._unread += token_ids
        if self._stops is not None:
            self._read()
        return self.stop is not None

    @property
    def pieces(self) -> list[str]:
        """Complete text that may be shown, in pieces; it is only appended to, and its whole is a prefix of the final text."""
        self._read()
        return self._pieces

    @property
    def text(self) -> str:
        """The pieces in one."""
        return "".join(self.pieces)

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
            self._release(0)
        return self.text

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
        if len(self._pending) < _MOST_PENDING:
            return ""
        self._move_context(len(self._pending), delta)  # a decoder of which no cut is known; a few characters may come out wrong
        return delta

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
        """Takes decoded text, looks for stop strings in it and decides how much may be shown."""
        if self.thinking is not None:
            delta = self.thinking.feed(delta, last=last)
        if not delta:
            return
        if self._stops is None:
            self._pieces.append(delta)
            return
        found, include = self._stops.read(delta), self._params.include_stop_str_in_output
        if found is not None and self._count > self._params.min_tokens:
            self.stop = found.stop
            self._hold(delta[: found.end])
            self._release(0 if include else len(found.stop))
            self._held.clear()
        else:
            self._hold(delta)
            self._release(0 if include else self._stops.begun)

    def _hold(self, text: str) -> None:
        self._held.append(text)
        self._num_held += len(text)

    def _release(self, kept: int) -> None:
        """Shows what is held but for the last `kept` characters."""
        while self._held and self._num_held > kept:
            piece = self._held.popleft()
            count = min(len(piece), self._num_held - kept)
            self._pieces.append(piece[:count])
            self._num_held -= count
            if count < len(piece):
                self._held.appendleft(piece[count:])
