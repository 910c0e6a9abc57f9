"""Triton's interpreter without what it computes again and again, or for nobody.

For every kernel it runs, and for every function that one calls, it looks through all members of `triton.language` for those that
it has to replace; they are the same each time. For every type it makes a table of types. And it compares all sums and products of
integers with what would overflow, for assertions that it leaves out unless it debugs.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from triton import language
from triton.language.core import is_builtin
from triton.runtime import interpreter


def make_it_quick() -> None:
    """To be called before a kernel runs."""
    _remember_members()
    _remember_types()
    _leave_out_what_is_not_asserted()


def _remember_members() -> None:
    """Look only at members that it has replaced at some time."""
    descriptors = getattr(language.core, "tensor_descriptor_base", None)
    places = filter(None, (language, language.core, language.core.tensor, language.math, descriptors))
    builtins = {place: [name for name, one in inspect.getmembers(place) if is_builtin(one)] for place in places}
    look_through = interpreter._patch_builtin

    def patch_builtin(place: Any, *rest: Any) -> None:
        if place not in builtins:
            return look_through(place, *rest)
        for name in builtins[place]:
            if is_builtin(member := getattr(place, name)):  # not where a function is called by one that has replaced it
                interpreter._patch_attr(place, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


def _remember_types() -> None:
    """NumPy's types of Triton's, by their names, of which each says all of its type."""
    known: dict[str, Any] = {}
    find = interpreter._get_np_dtype

    def numpy_type(of: Any) -> Any:
        if (found := known.get(of.name)) is None:
            found = known[of.name] = find(of)
        return found

    interpreter._get_np_dtype = numpy_type


def _leave_out_what_is_not_asserted() -> None:
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow") and not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
