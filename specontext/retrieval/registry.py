"""Every selection method by name: what settings may name, what reports say of it, and which class it is.

A method is one file in `methods/`, called as the method is, and one entry here. This file knows no code, so that settings and
options can be checked without importing any; `methods.selector_class` finds the class when an engine needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Colour and shape in pictures: a number of `--c0` .. of the report's style, None for the colour of text.
Look = tuple[int | None, str]
SHAPES = ("circle", "square", "diamond", "up", "down", "plus", "cross", "star")


@dataclass(frozen=True)
class Variant:
    """Another way to choose on the state of a method, which requests may name as METHOD-VARIANT; drawn in the method's colour.

    Attributes:
        words: what it does; `{}` stands for the words of its method.
        keeps_generated: all tokens after the prompt are read, besides the budget, for which no slots suffice.
    """

    name: str
    words: str
    shape: str
    keeps_generated: bool = False


@dataclass(frozen=True)
class Method:
    """An entry.

    Attributes:
        name: what settings and requests call it; its file is that with underscores.
        selector: the class in that file, made of a `MethodContext`.
        words: what it does, as reports say it.
        look: in pictures; None takes one that is free.
        needs_head: its context has a retrieval head.
        cheap: it needs no memory of its own, also within a step, so that engines run it without being asked to.
        bound: nothing to use but to compare with: what no method can be better than, or must be better than.
    """

    name: str
    selector: str
    words: str
    look: Look | None = None
    variants: tuple[Variant, ...] = ()
    needs_head: bool = False
    cheap: bool = False
    bound: Literal["upper", "lower"] | None = None

    @property
    def module(self) -> str:
        """The file in `methods/`, as it is imported."""
        return f"specontext.retrieval.methods.{self.name.replace('-', '_')}"


def _prompt_only(shape: str) -> Variant:
    words = "{}; chooses among the tokens of the prompt only and keeps all generated ones"
    return Variant("prompt", words, shape, keeps_generated=True)


def _bands(count: int, shape: str) -> Variant:
    return Variant(f"bands{count}", f"{{}}; with sets for each of {count} bands of layers", shape)


ENTRIES = (
    Method(
        "full",
        "FullSelector",
        "reads everything, as the model does by itself; what the others are measured against",
        (None, "square"),
        cheap=True,
    ),
    Method(
        "speculative",
        "SpeculativeSelector",
        "a small retrieval head looks at the token about to be processed and chooses, before the model runs, what each KV head "
        "of all layers will read",
        (0, "circle"),
        (
            Variant("union", "as speculative, with one set for all KV heads: the union of their shrunk sets", "up"),
            Variant("batch", "as speculative, with one set for all KV heads: the best scores of all", "down"),
            Variant(
                "identity", "as speculative, without a head map: in every layer KV head h reads the set of group h", "diamond"
            ),
        ),
        needs_head=True,
    ),
    Method(
        "streaming",
        "StreamingSelector",
        "StreamingLLM: the first tokens and a window of the last ones",
        (4, "diamond"),
        cheap=True,
    ),
    Method(
        "oracle",
        "OracleSelector",
        "every layer first computes the true attention over everything and then reads the entries that it weighs most; an upper "
        "bound, since it saves nothing",
        (6, "star"),
        bound="upper",
    ),
    Method(
        "shared-oracle",
        "SharedOracleSelector",
        "the true attention over everything is computed for all layers beforehand, and each KV head reads the same best entries "
        "in all of them; an upper bound for what chooses before the model runs",
        (6, "up"),
        (_bands(2, "square"), _bands(3, "diamond"), _bands(5, "down")),
        bound="upper",
    ),
    Method(
        "random",
        "RandomSelector",
        "reads entries drawn by chance: the floor that any method must clear",
        (6, "cross"),
        bound="lower",
    ),
    Method(
        "quest",
        "QuestSelector",
        "Quest: reads pages of 16 tokens, chosen in each layer by bounds on what its query could score there",
        (1, "square"),
        (_prompt_only("cross"),),
    ),
    Method(
        "shadowkv",
        "ShadowKVSelector",
        "ShadowKV-style: reads chunks of 8 tokens, chosen in each layer by the mean of their keys",
        (3, "down"),
        (_prompt_only("plus"),),
    ),
    Method(
        "clusterkv",
        "ClusterKVSelector",
        "ClusterKV-style: groups keys of similar content, and reads the groups whose centres score best in each layer",
        (5, "star"),
        (_prompt_only("circle"),),
    ),
    Method(
        "snapkv",
        "SnapKVSelector",
        "SnapKV: chooses by the attention of the last tokens of the prompt, once",
        (2, "up"),
        (_prompt_only("diamond"),),
    ),
    Method(
        "h2o",
        "H2OSelector",
        "H2O: keeps the entries that have got the most attention so far, and forgets the others",
        (5, "plus"),
    ),
)

FULL = "full"  # what the others are measured against
DEFAULT = "speculative"
METHODS = tuple(entry.name for entry in ENTRIES)
_NAMED: dict[str, tuple[Method, Variant | None]] = {entry.name: (entry, None) for entry in ENTRIES}
_NAMED |= {f"{entry.name}-{variant.name}": (entry, variant) for entry in ENTRIES for variant in entry.variants}
CHOICES = tuple(_NAMED)  # methods, then the variants that requests may name besides
CHEAP_METHODS = tuple(entry.name for entry in ENTRIES if entry.cheap)


def entry_of(name: str) -> tuple[Method, Variant | None]:
    """The method that a name is, or is a variant of, and the variant; raises KeyError for no such name."""
    return _NAMED[name]


# What follows takes any name, also one of a report that was written elsewhere, and knows nothing of one that is not here. With a
# retrieval head of its own, NAME@HEAD, a method is what it is without.


def base_of(name: str) -> str:
    """The method that a name is, or is a variant of; else the name as it is."""
    entry, _ = _known(name)
    return entry.name if entry is not None else name


def variant_of(name: str) -> Variant | None:
    """The variant that a name is; None for a method."""
    return _known(name)[1]


def needs_head(name: str) -> bool:
    """Whether a method has a retrieval head."""
    entry, _ = _known(name)
    return entry is not None and entry.needs_head


def bound_of(name: str) -> Literal["upper", "lower"] | None:
    """Which bound a method is, if it is none to use."""
    entry, _ = _known(name)
    return entry.bound if entry is not None else None


def words_of(name: str) -> str | None:
    """What a method does."""
    entry, variant = _known(name)
    return None if entry is None else entry.words if variant is None else variant.words.format(entry.words)


def look_of(name: str) -> Look | None:
    """Colour and shape of a method; None where any will do."""
    entry, variant = _known(name)
    if entry is None or entry.look is None:
        return None
    return entry.look if variant is None else (entry.look[0], variant.shape)


def _known(name: str) -> tuple[Method, Variant | None] | tuple[None, None]:
    return _NAMED.get(name.partition("@")[0], (None, None))
