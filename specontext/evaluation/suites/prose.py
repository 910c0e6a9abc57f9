"""Text to hide facts in, and words to make them of; drawn, not copied, so any amount of it exists and none of it is known."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence

from specontext.tasks.words import ADJECTIVES, NOUNS, VERBS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
OPENINGS = (
    "In most cases",
    "After some time",
    "As a rule",
    "For that reason",
    "Years later",
    "On the other hand",
    "To begin with",
    "At the edge of the village",
    "Strange as it sounds",
    "When the weather turned",
)
CLAUSES = (
    "the {a} {n} {v} the {n2} before anyone had asked",
    "nobody {v} the {n} as long as the {n2} stood beside it",
    "a {a} {n} is worth more than a {n2} that people talk about",
    "what matters about a {n} is how {a} it looks beside a {n2}",
    "the owner of the {n} {v} a {a} {n2} and said nothing",
    "it was the {n}, not the {n2}, that they {v} in the end",
    "people who {v} one {n} soon wanted a {a} {n2} as well",
    "the {a} {n} of the neighbours had never been {v}",
)
LONG = 65_536  # tokens, for which words of two parts suffice
COUPLINGS = (", and ", ", but ", "; still, ", ", because ", ", although ", ", so ")


def prose_sentence(rng: random.Random) -> str:
    """One sentence of an essay about nothing."""
    said = rng.choice(COUPLINGS).join(_clause(rng) for _ in range(rng.choice((1, 1, 2))))
    if rng.random() < 0.4:
        said = f"{rng.choice(OPENINGS)}, {said}"
    return f"{said[0].upper()}{said[1:]}."


def _clause(rng: random.Random) -> str:
    first, second = rng.sample(NOUNS, 2)
    return rng.choice(CLAUSES).format(a=rng.choice(ADJECTIVES), n=first, n2=second, v=rng.choice(VERBS))


def scatter(sentences: Sequence[str], facts: Sequence[str], rng: random.Random) -> list[str]:
    """The facts at random places between the sentences, in their order."""
    places = sorted(rng.randrange(len(sentences) + 1) for _ in facts)
    mixed: list[str] = []
    start = 0
    for place, fact in zip(places, facts, strict=True):
        mixed += [*sentences[start:place], fact]
        start = place
    return mixed + list(sentences[start:])


def paragraphs(sentences: Sequence[str], rng: random.Random) -> str:
    """Sentences in paragraphs of a few."""
    parts: list[str] = []
    start = 0
    while start < len(sentences):
        size = rng.randint(4, 9)
        parts.append(" ".join(sentences[start : start + size]))
        start += size
    return "\n\n".join(parts)


def distinct_words(count: int, rng: random.Random, *, length: int) -> list[str]:
    """Different words such as `quiet-otter`, for a text of so many tokens; long texts need more words, which have three parts."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    longer = length > LONG
    words = []
    for i in rng.sample(range(pairs * len(NOUNS) if longer else pairs), count):
        end = f"-{NOUNS[i // pairs]}" if longer else ""
        words.append(f"{ADJECTIVES[i % len(ADJECTIVES)]}-{NOUNS[i % pairs // len(ADJECTIVES)]}{end}")
    return words


def random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
