"""Training texts: the tasks with many questions in one text, so that a sequence carries many answers."""

from __future__ import annotations

import math
import random
import re

from specontext.tasks.problem import LengthError, Problem, TokenCounter
from specontext.tasks.program import ProgramTask
from specontext.tasks.retrieval import RetrievalTask
from specontext.tasks.tracking import TrackingTask

KINDS = ("retrieval", "multivalue", "tracking", "program")
MOST_QUESTIONS = 64
ANSWERS = re.compile(r"(?<=Answer:)[^\n]+")
NANO_TURNS = ("<|user|>", "<|assistant|>", "<|end|>")
NO_TURNS = ("", "", "")


def sequence(
    kind: str, length: int, rng: random.Random, count_tokens: TokenCounter, *, turns: tuple[str, str, str] = NANO_TURNS
) -> tuple[str, list[tuple[int, int]]]:
    """A text of at most `length` tokens, not counting `turns`, in a chat format or plain.

    Args:
        turns: words before a user's and an assistant's turn, and at the end; `NO_TURNS` for plain text without an end.

    Returns:
        the text, and the character spans of its answers in order, the end part of the last.
    """
    problem = draw(kind, length, rng, count_tokens)
    opening, turn = turns[:2] if rng.random() < 0.25 else ("", "")
    prompt = opening + problem.prompt
    spans = [match.span() for match in ANSWERS.finditer(prompt)]
    start = len(prompt) + len(turn)
    text = f"{prompt}{turn} {problem.answer}{turns[2]}"
    return text, [*spans, (start, len(text))]


def draw(kind: str, length: int, rng: random.Random, count_tokens: TokenCounter) -> Problem:
    """One problem of a kind of `KINDS`; all questions but the last are answered in its prompt.

    Raises:
        LengthError: not even the smallest problem of the kind fits.
    """
    most = 200
    while True:
        filler = rng.choice((0.0, 1.0, 1.0))
        keys = between(1, max(2, min(length // 12, most)), rng)
        task: RetrievalTask | TrackingTask | ProgramTask
        if kind == "retrieval":
            asked = rng.choice((1, 2, 4, 8))
            questions = max(1, min(keys // asked, length // (20 + 6 * asked), MOST_QUESTIONS))
            task = RetrievalTask(kind, (keys, keys), (1, asked), questions=(1, questions), filler=filler)
        elif kind == "multivalue":
            questions = max(1, min(keys, length // 50, MOST_QUESTIONS))
            task = RetrievalTask(kind, (keys, keys), (1, 1), values=(1, 4), questions=(1, questions), filler=filler)
        elif kind == "tracking":
            hops = rng.randint(1, 5)
            chains = between(1, max(2, min(length // 48, most // 2, 300 // (hops + 1))), rng)
            task = TrackingTask(kind, (chains, chains), (hops, hops), questions=(1, min(chains, MOST_QUESTIONS)), filler=filler)
        else:
            task = ProgramTask(kind)
            if rng.random() < 0.3:
                length = rng.randint(min(64, length), length)
        try:
            return task.sample(length, rng, count_tokens)
        except LengthError:
            if most <= 2:
                raise
            most = max(2, int(most * 0.7))


def between(low: int, high: int, rng: random.Random) -> int:
    """An integer of [low, high], each order of magnitude as likely as the next."""
    return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))
