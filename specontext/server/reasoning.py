"""Where a model's thinking ends and its answer begins: what the engine must know to tell them apart."""

from __future__ import annotations

from typing import Any

from specontext.sampling_params import Thinking
from specontext.server.tools import harmony

BEGIN, END = Thinking.begin, Thinking.end
CHANNELS = "harmony"  # the parser of models whose thinking is a message of its own


class Reasoning:
    """A reasoning parser over one tokenizer.

    Args:
        parser: one of `REASONING_PARSERS`, or `CHANNELS`.
    """

    def __init__(self, parser: str, tokenizer: Any) -> None:
        self._parser = parser
        self._begin_id, self._end_id = _single_token(tokenizer, BEGIN), _single_token(tokenizer, END)
        self._message_end = _single_token(tokenizer, harmony.END)

    def thinking(self, prompt: str, *, continued: str | None = None) -> Thinking:
        """How the output after a prompt is to be split; arguments as for `starts_inside`."""
        if self._parser == CHANNELS:
            return Thinking(False, begin=harmony.THOUGHT, end=harmony.END, end_id=self._message_end)
        inside = starts_inside(self._parser, prompt, continued=continued)
        return Thinking(inside, begin_id=self._begin_id, end_id=self._end_id)


def starts_inside(parser: str, prompt: str, *, continued: str | None = None) -> bool:
    """Whether an output begins with thinking although it does not say so.

    Only a mark at the very end of the prompt counts, which the chat template puts there: others are somebody's words.

    Args:
        continued: text of the message that the prompt ends amid, if it does: it may have begun to think, and ended.
    """
    end = prompt.rstrip()
    if continued is not None:
        last = max(continued.rfind(BEGIN), continued.rfind(END))
        if last >= 0:
            return continued.startswith(BEGIN, last)
        begin = end.rfind(continued.strip())
        end = end[:begin].rstrip() if begin >= 0 else end
    if end.endswith((BEGIN, END)):
        return end.endswith(BEGIN)
    return parser == "deepseek_r1"  # R1 always thinks first


def _single_token(tokenizer: Any, mark: str) -> int | None:
    ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 else None
