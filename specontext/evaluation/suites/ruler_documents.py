"""RULER's question answering: one or two of many documents hold the answer.

RULER takes passages and questions of SQuAD (one document answers) and HotpotQA (two must be joined). Here both are drawn:
invented buildings and people, every distractor of the same kind, so that only the text can tell.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from specontext.evaluation.suites.example import Example, TextTools
from specontext.evaluation.suites.generated import GeneratedTask, most_units
from specontext.evaluation.suites.matching import match_part

ANSWER_TOKENS = 32
KINDS = ("lighthouse", "library", "bridge", "windmill", "theatre", "chapel", "observatory", "harbour", "mill", "museum")
STARTS = (
    "Bren",
    "Tor",
    "Al",
    "Kes",
    "Mar",
    "Hol",
    "Vil",
    "Ost",
    "Dun",
    "Fen",
    "Gar",
    "Is",
    "Lor",
    "Nar",
    "Pel",
    "Ras",
    "Syl",
    "Ul",
)
MIDDLES = ("a", "e", "i", "o", "u", "an", "en", "il", "or", "us", "ar", "em")
ENDS = ("moor", "dale", "ford", "wick", "stead", "holm", "bury", "gate", "field", "mouth", "den", "thorpe")
PERSON_ENDS = ("sson", "mann", "ley", "ton", "vik", "ard", "berg", "elli", "ova", "quist", "row", "ham")
TRADES = ("architect", "engineer", "carpenter", "mason", "merchant", "botanist", "sailor", "clockmaker", "teacher", "printer")
INSTRUCTION = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class Building:
    """An invented building and the one who built it."""

    kind: str
    place: str
    builder: str
    birthplace: str
    trade: str
    year: int
    height: int

    @property
    def title(self) -> str:
        return f"The {self.kind} of {self.place}"

    def document(self) -> str:
        return (
            f"{self.title}\n{self.title} stands at the edge of the old town. It was built by {self.builder} and opened in "
            f"{self.year}. It is {self.height} metres high, and its stones came from the quarries nearby."
        )

    def biography(self) -> str:
        return (
            f"{self.builder}\n{self.builder} was born in {self.birthplace} as the youngest of four children, worked as "
            f"{'an' if self.trade[0] in 'aeiou' else 'a'} {self.trade} for many years, and wrote letters about the journey there."
        )


@dataclass(frozen=True)
class DocumentsTask(GeneratedTask):
    """A question about one of many documents.

    Attributes:
        hops: 1: the document of a building has the answer. 2: the answer stands in the document of its builder.
    """

    hops: int = 1

    def draw(self, key: str, length: int, rng: random.Random, text: TextTools) -> Example:
        about = _building(rng, set())
        question, answer = self._question(about, rng)
        others_seed = rng.random()

        def prompt(others: int) -> str:
            fresh = random.Random(others_seed)
            used = {about.place, about.builder, about.birthplace}
            buildings = [about, *(_building(fresh, used) for _ in range(others))]
            documents = [building.document() for building in buildings]
            if self.hops == 2:
                documents += [building.biography() for building in buildings]
            fresh.shuffle(documents)
            listed = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, start=1))
            message = f"{INSTRUCTION}\n\nThe following are given documents.\n\n{listed}\n\n{INSTRUCTION}\n\nQuestion: {question}"
            return f"{text.chat(message)} Answer:"

        others = most_units(lambda n: text.count_tokens(prompt(n)), length - ANSWER_TOKENS, least=1)
        return Example(self.suite, self.name, key, prompt(others), (answer,), ANSWER_TOKENS, length)

    def score(self, example: Example, output: str) -> dict[str, float]:
        return {"score": match_part(output, example.references)}

    def _question(self, about: Building, rng: random.Random) -> tuple[str, str]:
        name = f"the {about.kind} of {about.place}"
        if self.hops == 2:
            return f"In which town was the builder of {name} born?", about.birthplace
        return rng.choice(
            (
                (f"Who built {name}?", about.builder),
                (f"In which year was {name} opened?", str(about.year)),
                (f"How many metres high is {name}?", str(about.height)),
            )
        )


def _building(rng: random.Random, used: set[str]) -> Building:
    """A building of fresh names, which join the used ones."""

    def fresh(ends: tuple[str, ...], first: str = "") -> str:
        while True:
            middle = "".join(rng.choices(MIDDLES, k=rng.randint(1, 3)))
            name = f"{first}{rng.choice(STARTS)}{middle}{rng.choice(ends)}"
            if name not in used:
                used.add(name)
                return name

    first = f"{rng.choice(STARTS)}{rng.choice(MIDDLES)} "
    return Building(
        rng.choice(KINDS),
        fresh(ENDS),
        fresh(PERSON_ENDS, first),
        fresh(ENDS),
        rng.choice(TRADES),
        rng.randint(1650, 1950),
        rng.randint(101, 998),
    )
