"""Pages of other origins, trailing slashes and HEAD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from specontext.errors import ConfigError
from specontext.server.settings import ServerConfig
from tests.server.serving import Server, make_engine, running
from tests.server.test_errors import CHAT, GOOD

PAGE = "http://localhost:3000"
KEY = {"authorization": "Bearer k"}
ASKS = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


@pytest.fixture(scope="module")
def open_to_page() -> Iterator[Server]:
    with running(make_engine(), api_key=("k",), allowed_origins=(PAGE,), allow_credentials=True) as server:
        yield server


def test_a_page_that_is_allowed(open_to_page: Server) -> None:
    preflight = open_to_page.http.options(CHAT, headers=ASKS)  # browsers send no key with it
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert preflight.headers["access-control-allow-credentials"] == "true"
    answer = open_to_page.post(CHAT, GOOD[CHAT], headers=KEY | {"origin": PAGE})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    streamed = open_to_page.post(CHAT, GOOD[CHAT] | {"stream": True}, headers=KEY | {"origin": PAGE})
    assert streamed.text.endswith("data: [DONE]\n\n") and streamed.headers["access-control-allow-origin"] == PAGE
    for refused in (
        open_to_page.post(CHAT, GOOD[CHAT], headers={"origin": PAGE}),
        open_to_page.post(CHAT, {}, headers=KEY | {"origin": PAGE}),
    ):  # the page may read the error too
        assert refused.status_code in (400, 401) and refused.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in refused.headers["access-control-expose-headers"]


def test_a_page_that_is_not_allowed(open_to_page: Server, server: Server) -> None:
    assert open_to_page.http.options(CHAT, headers=ASKS | {"origin": "http://evil.example"}).status_code == 400
    answer = open_to_page.get("/v1/models", headers=KEY | {"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    off = server.http.options(CHAT, headers=ASKS)
    assert (
        off.status_code == 405
        and off.headers["allow"] == "POST"
        and not any(name.startswith("access-control") for name in off.headers)
    )
    assert not any(name.startswith("access-control") for name in server.get("/v1/models", headers={"origin": PAGE}).headers)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allowed_origins": ("localhost:3000",)}, "http://localhost:3000"),
        ({"allowed_origins": ("http://localhost:3000/",)}, "not an origin"),
        ({"allowed_origins": ("http://*.example.com",)}, "not an origin"),
        ({"allowed_origins": ("http://user@example.com",)}, "not an origin"),
        ({"allowed_origins": ("http://bücher.example",)}, "not an origin"),
        ({"allowed_origins": ("",)}, "empty"),
        ({"allowed_origins": ("[1]",)}, "JSON"),
        ({"allow_credentials": True}, "allowed_origins"),
        ({"allowed_methods": ("GET",)}, "allowed_origins"),
        ({"allowed_headers": ("x",)}, "allowed_origins"),
    ],
)
def test_origins_that_are_none(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServerConfig(**options)


def test_lists_as_vllm_has_them() -> None:
    config = ServerConfig(allowed_origins=('["http://a", "https://b:5"]',), allowed_methods=('["GET"]',))
    assert config.allowed_origins == ("http://a", "https://b:5") and config.allowed_methods == ("GET",)
    assert ServerConfig(allowed_origins=("*",)).allowed_headers == ("*",)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("HTTP://LocalHost:3000", "http://localhost:3000"),
        ("http://localhost:80", "http://localhost"),
        ("https://example.com:443", "https://example.com"),
        ("https://example.com:80", "https://example.com:80"),
        ("http://[::1]:80", "http://[::1]"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("null", "null"),
    ],
)
def test_origins_are_written_as_browsers_do(written: str, meant: str) -> None:
    config = ServerConfig(allowed_origins=(written,), allowed_methods=("get", "POST"))
    assert config.allowed_origins == (meant,) and config.allowed_methods == ("GET", "POST")


def test_slashes_at_the_end(open_to_page: Server) -> None:
    for path in ("/v1/models/", "/v1/models/nano/", "/version/", "/metrics/", "/status/", "/openapi.json/", "/v1/models//"):
        assert open_to_page.get(path, headers=KEY).status_code == 200, path
        assert open_to_page.get(path).status_code == 401
    assert open_to_page.get("/health/").status_code == 200
    assert open_to_page.get("/v1/models/nano/", headers=KEY).json()["id"] == "nano"
    assert open_to_page.post(CHAT + "/", GOOD[CHAT], headers=KEY).status_code == 200
    assert open_to_page.get("/v1/", headers=KEY).status_code == 404


def test_head(open_to_page: Server) -> None:
    for path in ("/v1/models", "/v1/models/", "/version", "/health", "/"):
        head, get = open_to_page.http.head(path, headers=KEY), open_to_page.get(path, headers=KEY)
        assert head.status_code == get.status_code == 200 and head.content == b""
        assert head.headers["content-type" if path != "/health" else "content-length"]
    assert open_to_page.http.head("/v1/models").status_code == 401
    assert open_to_page.http.head("/nothing", headers=KEY).status_code == 404
    assert open_to_page.http.head(CHAT, headers=KEY).status_code == 405


def test_options_needs_no_key(open_to_page: Server) -> None:
    with running(make_engine(), api_key=("k",)) as without_origins:
        for server in (open_to_page, without_origins):
            for path in (CHAT, "/v1/models", "/status"):  # no preflight: one of its headers is missing, or both
                for headers in ({}, {"origin": PAGE}):
                    assert server.http.options(path, headers=headers).status_code == 405, (path, headers)
            assert server.http.options("/nowhere").status_code == 404
        assert without_origins.http.options(CHAT, headers=ASKS).status_code == 405
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            assert without_origins.http.request(method, "/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "taken"),
    [
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/nano", "GET, HEAD"),
        ("PUT", "/health", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("GET", CHAT, "POST"),
        ("HEAD", CHAT, "POST"),
    ],
)
def test_methods_that_a_path_takes(open_to_page: Server, method: str, path: str, taken: str) -> None:
    answer = open_to_page.http.request(method, path, headers=KEY)
    assert answer.status_code == 405 and answer.headers["allow"] == taken
    assert method == "HEAD" or f"use {taken}" in answer.json()["error"]["message"]
    for each in taken.split(", "):
        assert open_to_page.http.request(each, path, headers=KEY).status_code != 405
