"""The garbage collector passes over what a server has for good, and over nothing that came later."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Iterator

import pytest

from specontext.config import EngineConfig
from specontext.engine.long_lived import kept
from specontext.server.run import serve
from specontext.server.settings import ServerConfig


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """What these tests have unfrozen is passed over again by those that follow, as it was."""
    yield
    gc.freeze()


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_is_passed_over_and_what_comes_is_not() -> None:
    before, dropped = Cycle(), weakref.ref(Cycle())
    known = weakref.ref(before)
    with kept():
        assert dropped() is None, "garbage is not kept"
        del before
        later = weakref.ref(Cycle())
        gc.collect()
        assert known() is not None and later() is None
    gc.collect()
    assert known() is None


def test_a_server_that_listens_has_what_it_loaded_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def announce(*_: object) -> None:
        found.append(gc.get_freeze_count())
        signal.raise_signal(signal.SIGTERM)

    found: list[int] = []
    monkeypatch.setattr("specontext.server.run.configure_logging", lambda: None)
    serve(EngineConfig("nano"), ServerConfig(port=0), announce=announce)
    assert found[0] > 100_000 > gc.get_freeze_count()
