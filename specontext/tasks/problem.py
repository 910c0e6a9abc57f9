"""What a generated problem is, and the filler text that far-apart facts hide in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specontext.tasks.words import ADJECTIVES, NOUNS, VERBS

TokenCounter = Callable[[str], int]


@dataclass(frozen=True)
class Problem:
    """One generated problem.

    Attributes:
        task: name of the task that made it.
        prompt: text the model is given.
        answer: text that a correct output contains verbatim.
        length: tokens of prompt plus answer under the tokenizer that the problem was made for.
    """

    task: str
    prompt: str
    answer: str
    length: int

    def solved_by(self, output: str) -> bool:
        """Exact match: the output contains the answer verbatim."""
        return self.answer in output


class LengthError(ValueError):
    """The requested length cannot hold the task."""


def filler_sentence(rng: random.Random) -> str:
    """One sentence without a fact; it uses the same nouns as the facts do, and sometimes a number."""
    pick = rng.random()
    first, second = rng.choice(NOUNS), rng.choice(NOUNS)
    adjective, verb = rng.choice(ADJECTIVES), rng.choice(VERBS)
    if pick < 0.5:
        return f" the {adjective} {first} {verb} a {second}."
    if pick < 0.8:
        return f" then the {first} {verb} the {adjective} {second} beside the {rng.choice(NOUNS)}."
    return f" a {first} has {rng.randrange(100, 1000)} {second}."


def hide(facts: Sequence[str], room: int, rng: random.Random, count_tokens: TokenCounter, *, filler: float = 1.0) -> str:
    """Spread `facts`, in their order, over filler sentences until about `room` tokens are used (never more).

    Args:
        room: tokens that the text may take.
        filler: probability that free room is filled at all; below 1 some texts are facts only (used in training).

    Raises:
        LengthError: the facts alone need more than `room` tokens.
    """
    used = sum(count_tokens(fact) for fact in facts)
    if used > room:
        raise LengthError(f"{len(facts)} facts need {used} tokens and only {room} are left: ask for a greater length")
    sentences: list[str] = []
    if rng.random() < filler:
        while True:
            sentence = filler_sentence(rng)
            used += count_tokens(sentence)
            if used > room:
                break
            sentences.append(sentence)
    places = sorted(rng.randrange(len(sentences) + 1) for _ in facts)
    text: list[str] = []
    start = 0
    for place, fact in zip(places, facts, strict=True):
        text += sentences[start:place]
        text.append(fact)
        start = place
    return "".join(text + sentences[start:])


def assemble(
    task: str,
    header: str,
    facts: Sequence[str],
    dialogue: Sequence[tuple[str, str]],
    length: int,
    rng: random.Random,
    count_tokens: TokenCounter,
    filler: float,
) -> Problem:
    """The problem of `length` tokens at most: header, hidden facts, answered questions, and the question to answer.

    Args:
        dialogue: (question, answer) texts in order; the answer of the last one is the problem's.

    Raises:
        LengthError: facts and questions alone are longer than `length`.
    """
    answered = "".join(question + answer for question, answer in dialogue[:-1])
    question, answer = dialogue[-1]
    fixed = count_tokens(header) + count_tokens(answered + question) + count_tokens(answer)
    text = hide(facts, length - fixed, rng, count_tokens, filler=filler)
    prompt = header + text + answered + question
    return Problem(task, prompt, answer.strip(), count_tokens(prompt) + count_tokens(answer))
