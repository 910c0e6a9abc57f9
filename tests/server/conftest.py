"""The server that most tests here share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.serving import Server, make_engine, running


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that tests share; whoever leaves requests behind in it has found a bug."""
    with running(make_engine()) as server:
        yield server
        server.check_idle()
