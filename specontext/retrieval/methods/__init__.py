"""One selection method a file, called as the method is; `registry.py` has an entry for each.

A variant is called METHOD-VARIANT and shares its method's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

from specontext.retrieval.registry import base_of, entry_of, needs_head
from specontext.retrieval.selector import LayerSelector, MethodContext, Selector


def selector_class(name: str) -> type[Selector]:
    """The class of a method, or of the method that a variant belongs to."""
    entry, _ = entry_of(name)
    found: type[Selector] = getattr(import_module(entry.module), entry.selector)
    return found


def token_sets(name: str, context: MethodContext) -> int:
    """Token sets of a method or variant; raises ConfigError where it cannot work."""
    _, variant = entry_of(name)
    return selector_class(name).token_sets(context, None if variant is None else variant.name)


def context_of(name: str, context: MethodContext) -> MethodContext:
    """What a method, or a variant of it, is made of: on one of several ranks only the rank's part, unless it chooses for all KV
    heads at once."""
    own = issubclass(selector_class(name), LayerSelector) or (needs_head(name) and context.head_is_part)
    return replace(context, shape=context.part) if context.part is not None and own else context


def make_selectors(names: Sequence[str], context: MethodContext) -> dict[str, Selector]:
    """Methods by name; the method of each variant must be among them."""
    made: dict[str, Selector] = {}
    for name in sorted(names, key=lambda name: name != base_of(name)):  # methods before their variants
        _, variant = entry_of(name)
        own = context_of(name, context)
        made[name] = selector_class(name)(own) if variant is None else made[base_of(name)].variant(variant.name)
    return made
