"""One selection method a file, and the table of them.

A variant is called METHOD-VARIANT and shares its method's state: `union` and `batch` choose one set for all heads, `identity`
reads with the identity head map, `prompt` selects from the prompt only and reads all generated tokens besides, `bandsN` chooses
for N bands of layers.
"""

from __future__ import annotations

import copy

from specontext.config import METHODS
from specontext.retrieval.methods.clusterkv import ClusterKVSelector
from specontext.retrieval.methods.full import FullSelector
from specontext.retrieval.methods.h2o import H2OSelector
from specontext.retrieval.methods.oracle import OracleSelector
from specontext.retrieval.methods.quest import QuestSelector
from specontext.retrieval.methods.random import RandomSelector
from specontext.retrieval.methods.shadowkv import ShadowKVSelector
from specontext.retrieval.methods.shared_oracle import SharedOracleSelector
from specontext.retrieval.methods.snapkv import SnapKVSelector
from specontext.retrieval.methods.speculative import SpeculativeSelector
from specontext.retrieval.methods.streaming import StreamingSelector
from specontext.retrieval.selector import MethodContext, Selector

# Methods without a retrieval head; that one has `SpeculativeSelector`.
HEADLESS: dict[str, type[Selector]] = {
    "full": FullSelector,
    "oracle": OracleSelector,
    "shared-oracle": SharedOracleSelector,
    "random": RandomSelector,
    "streaming": StreamingSelector,
    "quest": QuestSelector,
    "shadowkv": ShadowKVSelector,
    "clusterkv": ClusterKVSelector,
    "snapkv": SnapKVSelector,
    "h2o": H2OSelector,
}


def base_of(name: str) -> str:
    """The method that a name is, or is a variant of; a name of none as it is."""
    return next((method for method in METHODS if name == method or name.startswith(f"{method}-")), name)


def make_method(name: str, context: MethodContext) -> Selector:
    """A method without a retrieval head, by its name."""
    return HEADLESS[name](context)  # type: ignore[call-arg]


def make_variant(selector: Selector, name: str) -> Selector:
    """The variant `name` (its whole name) of a method, on the method's state."""
    variant = name.removeprefix(f"{base_of(name)}-")
    if isinstance(selector, SpeculativeSelector):
        return selector.choosing(variant)
    if isinstance(selector, SharedOracleSelector):
        return selector.banded(int(variant.removeprefix("bands")))
    assert variant == "prompt"
    other = copy.copy(selector)
    other.keep_generated = True
    return other


__all__ = [
    "HEADLESS",
    "ClusterKVSelector",
    "FullSelector",
    "H2OSelector",
    "OracleSelector",
    "QuestSelector",
    "RandomSelector",
    "ShadowKVSelector",
    "SharedOracleSelector",
    "SnapKVSelector",
    "SpeculativeSelector",
    "StreamingSelector",
    "base_of",
    "make_method",
    "make_variant",
]
