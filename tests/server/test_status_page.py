"""The status page in a real browser, on a phone's screen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.browser import Page, browsing, find_browser
from tests.server.serving import Server, make_engine, running
from tests.server.test_robustness import ENDLESS, open_stream

FITS = "(box => box.scrollWidth <= box.clientWidth)(document.querySelector('.scroll'))"
NARROW = f"document.documentElement.scrollWidth <= 390 && {FITS}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here: install Debian's package chromium to test the status page")
    pytest.importorskip("websockets")
    with browsing(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_it_shows_what_the_engine_does(server: Server, page: Page, tmp_path: Path) -> None:
    server.check_idle()
    page.open(server.url + "/")
    page.wait_for_text("state", "idle")
    assert page.text("requests") == "none"
    streams = [open_stream(server, ENDLESS | {"prompt": [5] * 100}) for _ in range(3)]
    for stream in streams:
        assert stream.recv(100)
    page.wait("document.querySelectorAll('#requests tr').length === 3 && +document.getElementById('generated').innerText > 0")
    page.wait("document.getElementById('loaded').innerText.endsWith('iB')")
    assert page.evaluate(NARROW)
    picture = page.screenshot()
    shown = {name: page.text(name) for name in ("model", "state", "running", "waiting", "overlap", "host-text", "layers-text")}
    rows = page.text("requests").splitlines()
    for stream in streams:
        stream.close()
    assert (shown["model"], shown["state"], shown["running"], shown["waiting"]) == ("nano", "working", "3", "0")
    assert re.fullmatch(r"[\d.]+ %", shown["overlap"]) and re.match(r"[\d.]+ [KM]iB of ", shown["host-text"])
    assert shown["layers-text"] == "2 on the device, 2 in host memory"
    assert page.evaluate("document.querySelectorAll('#layers .host').length") == 2
    assert all("running" in row and "100" in row for row in rows)
    assert "budget 64" in page.text("settings")
    assert picture.startswith(b"\x89PNG") and (tmp_path / "status.png").write_bytes(picture) > 20_000
    server.check_idle()
    page.wait_for_text("requests", "none")
    assert page.problems == []
    assert all(url.startswith((server.url, "data:", "about:")) for url in page.urls)


def test_it_asks_for_the_key(page: Page) -> None:
    with running(make_engine(), api_key=("secret",)) as server:
        page.open(server.url + "/")
        page.wait_for_text("state", "locked")
        assert page.evaluate("document.getElementById('key').offsetParent !== null") and page.evaluate(NARROW)
        page.evaluate("document.getElementById('key').value = 'secret'; document.querySelector('#ask button').click()")
        page.wait_for_text("state", "idle")
        assert page.text("model") == "nano" and page.evaluate("document.getElementById('key').offsetParent === null")
    page.wait_for_text("state", "gone")
    page.open("about:blank")
