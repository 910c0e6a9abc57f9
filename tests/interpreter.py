"""Triton's interpreter asked less often for the same: which members of its language it has to replace.

For every kernel it runs, and for every function that one calls, it looks through all members of `triton.language`, again and
again; they are the same each time.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton import language
from triton.language.core import is_builtin
from triton.runtime import interpreter


def remember_members() -> None:
    """Have the interpreter look only at members that it has replaced at some time; to be called before a kernel runs."""
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
