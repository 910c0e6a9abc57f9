"""Long documents that look things up: a fact stands in real text, and is needed again, word for word, far below.

Seven forms: notes, directory (a table), settings, program, quotations, answers (chat) and reading (chat). The text between
the facts is real, of the split that the document belongs to; names, numbers and facts are drawn. Everything follows from a
seed. A document fills one window, and ends in look-ups.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

GIVEN = (
    "Ada Bruno Carla Daniel Elena Farid Greta Hassan Irene Jonas Katya Luis Mina Nadia Oscar Priya Quentin Rosa Samir Tilda "
    "Umar Vera Walter Xenia Yusuf Zora Amara Benedikt Chiara Dmitri Esther Felix Gwen Hiroshi Ingrid Jamal Keiko Leon Maren Nils"
).split()
PLACES = ("/var/lib", "/srv", "/opt", "/home")
ENDINGS = ("db", "log", "sock", "json")
LETTERS = "ABCDEFGHKLMNPRSTVXZ"
SYLLABLES = (
    "ba cor del fen gar hol is jun kel lor mar nes or pel quin ras sol tam ul ver wex yor zan bri dra fal gro kin mol ten vas"
).split()
NOUNS = (
    "archive boiler cabinet dock engine furnace garden harbour instrument journal kiln ledger mill nursery observatory press "
    "quarry registry station tower vault warehouse workshop cellar pump gallery clinic library bridge ferry signal turbine"
).split()
TRAITS = (
    "access code",
    "telephone number",
    "serial number",
    "opening year",
    "inventory number",
    "call sign",
    "street address",
    "locker",
)
VERBS = (
    "align apply attach build check clip collect compare convert count decode detect expand fetch fold gather join merge pack"
).split()


@dataclass
class Maker:
    """Draws names and values; no name is drawn twice in a document."""

    rng: random.Random
    used: set[str] = field(default_factory=set)

    def word(self, syllables: int = 2) -> str:
        return "".join(self.rng.choice(SYLLABLES) for _ in range(syllables))

    def fresh(self, draw: Callable[[], str]) -> str:
        while (name := draw()) in self.used:
            pass
        self.used.add(name)
        return name

    def person(self) -> str:
        return self.fresh(lambda: f"{self.rng.choice(GIVEN)} {self.word(self.rng.choice((2, 3))).capitalize()}")

    def thing(self) -> str:
        return self.fresh(lambda: f"{self.word().capitalize()} {self.rng.choice(NOUNS)}")

    def value(self, trait: str) -> str:
        rng = self.rng
        if "year" in trait:
            return str(rng.randrange(1710, 2020))
        if "telephone" in trait:
            return f"{rng.randrange(200, 999)}-{rng.randrange(1000, 9999)}"
        if "address" in trait:
            return f"{rng.randrange(2, 290)} {self.word().capitalize()} {rng.choice(('Street', 'Lane', 'Road', 'Square'))}"
        if "sign" in trait:
            return "-".join(self.word().capitalize() for _ in range(2)) + f"-{rng.randrange(10, 99)}"
        return rng.choice((
            f"{rng.randrange(10**4, 10**6)}",
            f"{self.word(1).upper()}-{rng.randrange(100, 9999)}",
            f"{rng.choice(LETTERS)}{rng.randrange(10, 99)}{rng.choice(LETTERS)}{rng.randrange(100, 999)}",
        ))  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """The real text between the facts, and how long a document becomes.

    pieces: draws a run of neighbouring paragraphs of a kind with about so many characters.
    chat: a conversation in the model's own template.
    tokens: the length of a text; a document has `window` of them, and at most `over` more.
    characters: of the text between the facts.
    """

    pieces: Callable[[random.Random, str, int], list[str]]
    chat: Callable[[list[dict[str, str]]], str]
    tokens: Callable[[str], int]
    window: int
    over: int = 120
    characters: int = 27_000


def _spread(rng: random.Random, text: list[str], facts: list[str], lookups: list[str], asked_from: float) -> str:
    """Facts into the first `asked_from` of the paragraphs, their look-ups into the rest in another order."""
    edge = max(1, int(len(text) * asked_from))
    first, rest = text[:edge], text[edge:]
    for fact in facts:
        first.insert(rng.randrange(len(first) + 1), fact)
    rng.shuffle(lookups)
    tail = lookups[: len(lookups) // 3]
    for lookup in lookups[len(tail) :]:
        rest.insert(rng.randrange(len(rest) + 1), lookup)
    return "\n\n".join([*first, *rest, *tail])


def notes(rng: random.Random, ground: Ground) -> str:
    """Remarks in prose, repeated or asked after thousands of words."""
    maker, facts, lookups = Maker(rng), [], []
    say = rng.choice((
        ("Note: the {t} of the {n} is {v}.", "Reminder: the {t} of the {n}, as noted above, is {v}."),
        ("[The {n} has the {t} {v}.]", "[Question: what is the {t} of the {n}? Answer: {v}.]"),
        ("Remember that the {t} of the {n} is {v}.", "Q: What is the {t} of the {n}?\nA: {v}"),
        ("According to the keeper of the {n}, its {t} was {v}.", "The keeper of the {n} was asked for its {t} and said: {v}."),
    ))  # fmt: skip
    for _ in range(rng.randrange(14, 30)):
        trait, thing = rng.choice(TRAITS), maker.thing()
        value = maker.value(trait)
        facts.append(say[0].format(t=trait, n=thing, v=value))
        lookups += [say[1].format(t=trait, n=thing, v=value)] * rng.choice((1, 1, 2))
    return _spread(
        rng, ground.pieces(rng, rng.choice(("prose", "prose", "reference", "dialogue")), ground.characters), facts, lookups, 0.5
    )


def directory(rng: random.Random, ground: Ground) -> str:
    """A table at the start whose rows are needed below."""
    maker = Maker(rng)
    columns = ["name", *rng.sample(TRAITS, 3)]
    rows = [
        [maker.person() if rng.random() < 0.7 else maker.thing(), *(maker.value(c) for c in columns[1:])]
        for _ in range(rng.randrange(16, 36))
    ]
    style = rng.choice(("markdown", "csv", "fixed"))
    if style == "markdown":
        lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * 4, *rows)]
    elif style == "csv":
        lines = [",".join(row) for row in (columns, *rows)]
    else:
        lines = ["".join(cell.ljust(22) for cell in row).rstrip() for row in (columns, *rows)]
    ask = rng.choice((
        "Looking up the {c} of {n} in the table: {v}.",
        "{n}: {c} {v} (see the table).",
        "Question: which {c} is listed for {n}?\nAnswer: {v}",
        "The letter to {n} went out with the {c} {v}.",
    ))  # fmt: skip
    lookups = []
    for row in rng.sample(rows, min(len(rows), 22)):
        column = rng.randrange(1, 4)
        lookups.append(ask.format(c=columns[column], n=row[0], v=row[column]))
    text = ground.pieces(rng, rng.choice(("prose", "reference", "dialogue")), ground.characters - 60 * len(rows))
    return _spread(rng, ["\n".join(lines), *text], [], lookups, 0.4)


def settings(rng: random.Random, ground: Ground) -> str:
    """Configuration files whose keys, paths and values are used in commands and logs far below."""
    maker, facts, lookups = Maker(rng), [], []
    for _ in range(rng.randrange(5, 9)):
        service = maker.fresh(lambda: maker.word(2))
        keys = {
            "path": f"{rng.choice(PLACES)}/{service}/{maker.word()}/{maker.word(3)}.{rng.choice(ENDINGS)}",
            "port": str(rng.randrange(1024, 65535)),
            "token": f"{rng.getrandbits(48):012x}",
            "owner": maker.word(2),
            "timeout": str(rng.randrange(5, 900)),
        }
        style = rng.choice(("ini", "json", "yaml"))
        if style == "ini":
            body = f"[{service}]\n" + "\n".join(f"{key} = {value}" for key, value in keys.items())
        elif style == "json":
            body = f'"{service}": {{\n' + ",\n".join(f'  "{key}": "{value}"' for key, value in keys.items()) + "\n}"
        else:
            body = f"{service}:\n" + "\n".join(f"  {key}: {value}" for key, value in keys.items())
        facts.append(body)
        lookups += rng.sample((
            f"$ {service}ctl status\n{service} is listening on port {keys['port']}, started by {keys['owner']}",
            f"$ ls -l {keys['path']}\n-rw-r----- 1 {keys['owner']} {keys['owner']} {rng.randrange(10**3, 10**6)} {keys['path']}",
            f"$ curl -H 'Authorization: {keys['token']}' http://localhost:{keys['port']}/health\nok",
            f"{service}: the request took longer than the configured timeout of {keys['timeout']} seconds",
            f"To move the data of {service}, copy {keys['path']} and give it to the user {keys['owner']}.",
        ), 4)  # fmt: skip
    return _spread(
        rng, ground.pieces(rng, rng.choice(("reference", "reference", "code")), ground.characters), facts, lookups, 0.45
    )


def program(rng: random.Random, ground: Ground) -> str:
    """Functions and constants far above the code that calls them and the tests that know their values."""
    maker, facts, lookups = Maker(rng), [], []
    for _ in range(rng.randrange(12, 22)):
        name = maker.fresh(lambda: f"{rng.choice(VERBS)}_{maker.word()}_{rng.choice(NOUNS)}")
        first, second, option = maker.word(1) + "_id", maker.word(2), f"max_{maker.word(2)}"
        default, factor, constant = (
            rng.randrange(2, 99),
            rng.randrange(3, 60),
            f"{maker.word(2).upper()}_{rng.choice(NOUNS).upper()}",
        )
        facts.append(
            f"{constant} = {factor}\n\n\ndef {name}({first}, {second}, {option}={default}):\n"
            f'    """Return {first} times {constant} plus {second}, at most {option} times."""\n'
            f"    return {first} * {constant} + min({second}, {option})"
        )
        a, b = rng.randrange(1, 40), rng.randrange(1, default + 1)
        lookups += rng.sample((
            f"def test_{name}():\n    assert {name}({a}, {b}) == {a * factor + b}",
            f"result = {name}({first}={a}, {second}={b}, {option}={default})\nlogger.debug('%s', result)",
            f"# {name}({first}, {second}, {option}={default}) uses {constant} = {factor}\nvalues.append({name}({a}, {b}))",
            f"from helpers import {name}, {constant}\n\nassert {constant} == {factor}",
        ), 2)  # fmt: skip
    return _spread(rng, ground.pieces(rng, "code", ground.characters), facts, lookups, 0.5)


def quotations(rng: random.Random, ground: Ground) -> str:
    """Real text that quotes what stands in it far above, word for word."""
    text = ground.pieces(rng, rng.choice(("prose", "dialogue", "reference", "code")), ground.characters)
    edge = len(text) // 2
    long = [part for part in text[:edge] if 80 < len(part) < 700]
    say = rng.choice(
        ("As was said above: “{}”", "> {}", "To repeat the passage from before:\n\n{}", "Compare what stands above: {}")
    )
    quotes = [say.format(part) for part in rng.sample(long, min(len(long), rng.randrange(6, 14)))]
    return _spread(rng, text, [], quotes, 0.5)


def _sentences(text: list[str]) -> list[str]:
    joined = re.sub(r"\s+", " ", " ".join(text))
    return [part for part in re.split(r"(?<=[.!?]) (?=[A-Z“\"])", joined) if 60 < len(part) < 260 and part.count(" ") > 8]


def _conversation(rng: random.Random, ground: Ground, body: str, turns: list[tuple[str, str]]) -> str:
    opening = rng.choice(
        ("Read this text.\n\n{}\n\n{}", "{}\n\n---\n\nAnswer from the text above. {}", "Here is a document:\n\n{}\n\n{}")
    )
    messages: list[dict[str, str]] = []
    for index, (question, answer) in enumerate(turns):
        content = opening.format(body, question) if index == 0 else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return ground.chat(messages)


def answers(rng: random.Random, ground: Ground) -> str:
    """A chat about a document with drawn facts in it."""
    maker, facts, turns = Maker(rng), [], []
    for _ in range(rng.randrange(8, 18)):
        trait, thing = rng.choice(TRAITS), maker.thing()
        value = maker.value(trait)
        facts.append(
            rng.choice(("The {t} of the {n} is {v}.", "For the {n}, the {t} is {v}.", "{n}: {t} {v}.")).format(
                t=trait, n=thing, v=value
            )
        )
        question = rng.choice(("What is the {t} of the {n}?", "Tell me the {t} of the {n}.", "Which {t} does the {n} have?"))
        reply = rng.choice(("The {t} of the {n} is {v}.", "{v}", "According to the text, it is {v}."))
        turns.append((question.format(t=trait, n=thing), reply.format(t=trait, n=thing, v=value)))
    rng.shuffle(turns)
    text = ground.pieces(rng, rng.choice(("prose", "reference", "dialogue")), ground.characters - 90 * len(turns))
    return _conversation(rng, ground, _spread(rng, text, facts, [], 0.95), turns)


def reading(rng: random.Random, ground: Ground) -> str | None:
    """A chat about a real document: sentences completed, found by a word, quoted; None for text with hardly a sentence."""
    text = ground.pieces(rng, rng.choice(("prose", "prose", "reference", "dialogue")), ground.characters - 3000)
    turns: list[tuple[str, str]] = []
    pool = _sentences(text)
    if len(pool) < 8:
        return None
    for sentence in rng.sample(pool, min(len(pool), rng.randrange(8, 14))):
        words = sentence.split(" ")
        cut = len(words) // 2
        rare = max(words[1:], key=lambda word: (word[:1].isupper(), len(word))).strip(".,;:!?\"'()")
        turns.append(rng.choice((
            (f"Complete the sentence from the text: “{' '.join(words[:cut])} …”", sentence),
            (f"What does the text say about “{rare}”?", sentence),
            (f"Quote the sentence that begins with “{' '.join(words[:5])}”.", f"“{sentence}”"),
        )))  # fmt: skip
    return _conversation(rng, ground, "\n\n".join(text), turns)


Form = Callable[[random.Random, Ground], str | None]
FORMS: tuple[Form, ...] = (notes, directory, settings, program, quotations, answers, reading)


def fitted(seed: str, form: Form, ground: Ground) -> str | None:
    """A document whose real text is made longer or shorter until the whole fits, or None where it does not."""
    for _ in range(12):
        text = form(random.Random(seed), ground)
        if text is None:
            return None
        excess = ground.tokens(text) - ground.window
        if 0 <= excess <= ground.over:
            return text
        ground = replace(ground, characters=max(2000, ground.characters - round(3.3 * (excess - ground.over / 2))))
    return None


def lookups(seed: str, ground: Ground) -> Iterator[str]:
    """Documents of all forms in turn, without end."""
    index = 0
    while True:
        text = fitted(f"{seed}/{index}", FORMS[index % len(FORMS)], ground)
        if text is not None:
            yield text
        index += 1
