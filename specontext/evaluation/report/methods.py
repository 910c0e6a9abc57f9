"""Methods in words and in marks: what each one does, and the colour and shape it has in every picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DESCRIPTIONS = {
    "full": "reads everything, as the model does by itself; what the others are measured against",
    "speculative": "a small retrieval head looks at the token about to be processed and chooses, before the model runs, "
    "what each KV head of all layers will read",
    "speculative-union": "as speculative, with one set for all KV heads: the union of their shrunk sets",
    "speculative-batch": "as speculative, with one set for all KV heads: the best scores of all",
    "speculative-identity": "as speculative, without a head map: in every layer KV head h reads the set of group h",
    "oracle": "every layer first computes the true attention over everything and then reads the entries that it weighs most; an "
    "upper bound, since it saves nothing",
    "shared-oracle": "the true attention over everything is computed for all layers beforehand, and each KV head reads the same "
    "best entries in all of them; an upper bound for what chooses before the model runs",
    "random": "reads entries drawn by chance: the floor that any method must clear",
    "streaming": "StreamingLLM: the first tokens and a window of the last ones",
    "h2o": "H2O: keeps the entries that have got the most attention so far, and forgets the others",
    "snapkv": "SnapKV: chooses by the attention of the last tokens of the prompt, once",
    "quest": "Quest: reads pages of 16 tokens, chosen in each layer by bounds on what its query could score there",
    "shadowkv": "ShadowKV-style: reads chunks of 8 tokens, chosen in each layer by the mean of their keys",
    "clusterkv": "ClusterKV-style: groups keys of similar content, and reads the groups whose centres score best in each layer",
}
PROMPT_ONLY = "-prompt"
BANDS = "-bands"
PROMPT_ONLY_WORDS = "; chooses among the tokens of the prompt only and keeps all generated ones"
COLOURS = 7  # --c0 .. --c6 of style.css
SHAPES = ("circle", "square", "diamond", "up", "down", "plus", "cross", "star")
KNOWN = {  # colour, shape, dashed line; None is the colour of text
    "full": (None, "square", False),
    "speculative": (0, "circle", False),
    "speculative-union": (0, "up", True),
    "speculative-batch": (0, "down", True),
    "speculative-identity": (0, "diamond", True),
    "oracle": (6, "star", True),
    "shared-oracle": (6, "up", True),
    "shared-oracle-bands2": (6, "square", True),
    "shared-oracle-bands3": (6, "diamond", True),
    "shared-oracle-bands5": (6, "down", True),
    "random": (6, "cross", False),
    "streaming": (4, "diamond", False),
    "h2o": (5, "plus", False),
    "snapkv": (2, "up", False),
    "quest": (1, "square", False),
    "shadowkv": (3, "down", False),
    "clusterkv": (5, "star", False),
    "snapkv-prompt": (2, "diamond", True),
    "quest-prompt": (1, "cross", True),
    "shadowkv-prompt": (3, "plus", True),
    "clusterkv-prompt": (5, "circle", True),
}


@dataclass(frozen=True)
class Mark:
    """How a method is drawn: a class of style.css, a shape, a whole or a dashed line."""

    colour: str
    shape: str
    dashed: bool


def marks_of(methods: Sequence[str]) -> dict[str, Mark]:
    """A mark for every method, the same in every report for the known ones and different from each other for all."""
    taken = {KNOWN[method][:2] for method in methods if method in KNOWN}
    free = iter([(c, s) for s in SHAPES for c in range(COLOURS) if (c, s) not in taken] * (1 + len(methods) // 8))
    marks = {}
    for method in methods:
        colour, shape, dashed = KNOWN[method] if method in KNOWN else (*next(free), False)
        marks[method] = Mark("ink" if colour is None else f"c{colour}", shape, dashed)
    return marks


def describe(method: str) -> str | None:
    """What a method does, in words; None for an unknown one."""
    name, _, head = method.partition("@")
    base, _, bands = name.removesuffix(PROMPT_ONLY).partition(BANDS)
    if base not in DESCRIPTIONS:
        return None
    said = DESCRIPTIONS[base] + (PROMPT_ONLY_WORDS if name.endswith(PROMPT_ONLY) else "")
    said += f"; with sets for each of {bands} bands of layers" if bands else ""
    return said + (f"; with the retrieval head {head}" if head else "")
