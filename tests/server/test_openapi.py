"""The server against its own description: whatever fits it, or nearly does, is never answered with 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from specontext.server.app import create_app
from specontext.server.settings import ServerConfig
from tests.server.serving import PATIENCE, Server, make_engine, running

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance  # noqa: E402

DESCRIPTION: dict[str, Any] = create_app(SimpleNamespace(config=ServerConfig())).openapi()  # type: ignore[arg-type]
OPERATIONS = {found.ok().label: found.ok() for found in schemathesis.openapi.from_dict(DESCRIPTION).get_all_operations()}
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
PROFILE = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """With so short a context that no answer takes long."""
    with running(make_engine(max_model_len=64, budget=32), max_queued_requests=1000) as server:
        yield server
        server.check_idle()


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, mode) for label in OPERATIONS for mode in MODES if mode == MODES[0] or label.startswith("POST")],
    ids=lambda value: getattr(value, "value", value),
)
@pytest.mark.slow
def test_nothing_breaks_the_server(label: str, mode: Any, small: Server) -> None:
    answered: set[int] = set()

    @PROFILE
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        answer = case.call(base_url=small.url, timeout=PATIENCE)
        answered.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
        else:
            case.validate_response(answer, checks=[response_schema_conformance, status_code_conformance])

    ask()
    assert answered


def test_the_description() -> None:
    posts = {path for path, methods in DESCRIPTION["paths"].items() if "post" in methods}
    assert posts == {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
        *("/tokenize", "/detokenize"),
    }
    for path, methods in DESCRIPTION["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"], path
