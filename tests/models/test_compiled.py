"""Compiled functions stand at modules while a step runs, and at no other time."""

from __future__ import annotations

from torch import nn

from specontext.models.compiled import CompiledModules


def test_what_stood_at_a_module_stands_there_again() -> None:
    plain, patched = nn.Linear(2, 2), nn.Linear(2, 2)
    own = lambda states: states  # noqa: E731
    patched.forward = own  # type: ignore[method-assign]
    modules = CompiledModules([(plain, "forward"), (patched, "forward")])
    for _ in range(2):
        with modules.use(1):
            assert vars(plain)["forward"] is not own and vars(patched)["forward"] is not own
        assert "forward" not in vars(plain) and vars(patched)["forward"] is own
