"""What lm-eval's tasks ask for in their generation arguments, in this engine's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specontext.errors import RequestError

DEFAULT_TOKENS = 256  # of an answer where a task names no bound, as in lm-eval's own models
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "skip_special_tokens",
)


@dataclass(frozen=True)
class AnswerArguments:
    """How one answer is to be made.

    Attributes:
        max_tokens: of the answer.
        sampling: fields of `SamplingParams` that were named, among those of `SAMPLING`.
        stops: texts that end it.
    """

    max_tokens: int
    temperature: float
    sampling: dict[str, Any]
    stops: tuple[str, ...]


def read_arguments(arguments: Mapping[str, Any]) -> AnswerArguments:
    """Generation arguments of a request; what is sampled without a temperature has 1, and what says nothing is greedy.

    Raises:
        RequestError: one that the engine does not have.
    """
    options = dict(arguments)
    until = options.pop("until", None) or ()
    stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    named = [options.pop(name) for name in LENGTH_NAMES if options.get(name) is not None]
    sampled = options.pop("do_sample", None)
    temperature = options.pop("temperature", None)
    if sampled is False or (sampled is None and temperature is None):
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0
    if options.pop("num_beams", 1) != 1:
        raise RequestError("num_beams: the engine has no beam search")
    if unknown := sorted(name for name in set(options) - set(SAMPLING) - set(LENGTH_NAMES)):
        raise RequestError(f"generation argument {', '.join(unknown)} is not supported: give {', '.join(SAMPLING)}")
    chosen = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    return AnswerArguments(int(named[0]) if named else DEFAULT_TOKENS, float(temperature), chosen, stops)
