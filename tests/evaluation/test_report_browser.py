"""A report in a real browser: on a phone and a desk, in light and dark, with mouse and keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specontext.evaluation.report import write_report
from tests.evaluation.made_results import made_pair, made_results, made_row, made_selections, write
from tests.server.browser import PHONE, Page, browsing, find_browser
from tests.server.serving import wait_for

DESK = {"width": 1200, "height": 900, "deviceScaleFactor": 1, "mobile": False}
SECTIONS = ("answer", "accuracy", "differences", "selection", "answers", "tasks", "heads", "missing", "made", "terms")
LONG = "a_task_whose_name_never_ends_" * 8
READ = "[...document.querySelectorAll('#tokens .read, #tokens .always')].map(token => token.textContent.trim())"
# Texts whose contrast with what lies behind them is below 4.5 to 1; tokens that are yet to come are grey on purpose.
FAINT = """(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => { const [r, g, b] = parts(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = node => { for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor, [, , , alpha] = parts(colour);
    if (colour.startsWith('rgb') && (alpha === undefined || alpha === 1)) return colour; } return 'rgb(255, 255, 255)'; };
  const faint = [];
  for (const node of document.querySelectorAll('p, li, th, td, h1, h2, summary, dt, dd, a, caption, pre, button, svg text')) {
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), colour = node.tagName === 'text' ? style.fill : style.color;
    const [low, high] = [luminance(colour), luminance(behind(node))].sort((a, b) => a - b);
    const least = node.tagName === 'text' ? 3.5 : 4.5;
    if ((high + 0.05) / (low + 0.05) < least) faint.push(node.textContent.trim().slice(0, 40) + ' ' + colour);
  }
  return faint;
})()"""


PLACE_OF_MARK = """(() => {
  const mark = document.querySelector('#accuracy .mark');
  mark.scrollIntoView({block: 'center', behavior: 'instant'});
  const box = mark.querySelector('.target').getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2, mark.dataset.tip];
})()"""
INSIDE = """(() => {
  const box = document.getElementById('tip').getBoundingClientRect();
  return box.left >= 0 && box.right <= 390 && box.top >= 0;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here: install Debian's package chromium to test reports")
    pytest.importorskip("websockets")
    with browsing(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with every chapter, and with names as long and as bad as they may be."""
    results = made_results(
        ("full", "speculative", "quest"), budgets=(512,), tasks=("needle", LONG, "<img src=x onerror=problem()>")
    )
    results["rows"] += [made_row("full", None, suite="reasoning", task="program", output_tokens=300.0)]
    results["rows"] += [made_row("speculative", 512, suite="reasoning", task="program", output_tokens=310.0)]
    results["pairs"] += [made_pair("speculative", "full", -0.2, -0.1, suite="reasoning", task="program")]
    html, _ = write_report(write(tmp_path_factory.mktemp("report"), results, made_selections()))
    return html.as_uri()


@pytest.fixture
def page(browser: Page, url: str) -> Page:
    """The report, freshly opened on a phone."""
    return opened(browser, url, PHONE, dark=False)


def opened(page: Page, url: str, screen: dict[str, Any], *, dark: bool) -> Page:
    page.call("Emulation.setDeviceMetricsOverride", **screen)
    page.call(
        "Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    )
    page.open("about:blank")
    page.problems.clear()
    page.urls.clear()
    page.open(url)
    page.wait("document.readyState === 'complete' && document.querySelectorAll('#tokens span').length === 12")
    return page


def press(page: Page, key: str, code: int) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("screen", [PHONE, DESK], ids=["phone", "desk"])
def test_every_chapter_can_be_read(browser: Page, url: str, screen: dict[str, Any], dark: bool, tmp_path: Path) -> None:
    page = opened(browser, url, screen, dark=dark)
    for name in SECTIONS:
        assert page.evaluate(f"document.getElementById({name!r}).getBoundingClientRect().height > 60"), name
    assert page.evaluate("document.documentElement.scrollWidth") <= screen["width"]
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= screen["width"]
    assert page.evaluate(FAINT) == []
    page.evaluate("document.body.style.setProperty('--soft', getComputedStyle(document.body).backgroundColor)")
    assert len(page.evaluate(FAINT)) > 10  # it does see texts that cannot be read
    page.evaluate("document.body.style.removeProperty('--soft')")
    assert page.evaluate("[...document.querySelectorAll('figure svg')].every(svg => svg.getBoundingClientRect().width > 250)")
    assert page.problems == [] and [one for one in page.urls if not one.startswith("data:")] == [url]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) is dark
    picture = page.screenshot()
    assert picture.startswith(b"\x89PNG") and (tmp_path / "report.png").write_bytes(picture) > 50_000


def test_what_speaks_against_the_method_stands_at_the_top(page: Page) -> None:
    text = page.evaluate("document.querySelector('#answer .said.worse').innerText")
    assert (
        text.startswith("reasoning. speculative is worse")
        and "than full, program, 4,096 tokens, budget 512: −15.0 points" in text
    )
    assert page.evaluate("document.querySelector('#answer .said.good').innerText").startswith("ruler. In none of")


def test_the_slider_moves_through_the_steps(page: Page) -> None:
    assert page.evaluate(READ) == ["word0", "word2", "a"]
    assert page.evaluate("document.querySelector('#tokens .newest').textContent") == " a"
    assert "Step 1 of 3" in page.text("now") and "50.0 % of its true attention" in page.text("now")
    assert "It then writes “b”" in page.text("now")
    page.evaluate("document.getElementById('step').focus()")
    press(page, "ArrowRight", 39)
    page.wait("document.getElementById('now').innerText.startsWith('Step 2 of 3')")
    assert page.evaluate(READ) == ["word0", "word3", "b"] and "60.0 %" in page.text("now")
    assert page.evaluate("document.querySelectorAll('#tokens .later').length") == 2
    page.evaluate("document.getElementById('later').click()")
    assert page.evaluate(READ) == ["word0", "word4", "c"]
    page.evaluate("document.getElementById('later').click()")
    assert "Step 3 of 3" in page.text("now")
    page.evaluate("document.getElementById('earlier').click()")
    assert "Step 2 of 3" in page.text("now") and page.problems == []


def test_heads_read_what_they_read_beside_their_true_attention(page: Page) -> None:
    assert page.evaluate("document.querySelector('#tokens .missed').textContent.trim()") == "word5"
    shade = "[...document.querySelectorAll('#tokens [data-shade]')].map(token => token.textContent.trim() + token.dataset.shade)"
    assert page.evaluate(shade) == ["word24", "word54"]
    top = page.evaluate(
        "[...document.querySelectorAll('#top tbody tr')].map(row => [...row.children].map(cell => cell.innerText.trim()))"
    )
    assert top == [["word2", "2", "40.0 %", "yes"], ["word5", "5", "15.0 %", "no"]]
    page.evaluate("document.getElementById('head').value = 1; document.getElementById('head').dispatchEvent(new Event('input'))")
    assert page.evaluate(READ) == ["word0", "word1", "word7"]
    assert "KV head 1, which reads the set of group 0" in page.text("now")
    assert page.evaluate(shade) == ["word14"]
    assert (
        page.evaluate("document.querySelectorAll('#map rect').length") == 3
    )  # two runs of places that are read, one of attention


def test_play_goes_to_the_end(page: Page) -> None:
    page.evaluate("document.getElementById('play').click()")
    wait_for(lambda: "Step 3 of 3" in page.text("now"), "the last step")
    page.wait("document.getElementById('play').textContent === 'Play'")


def test_marks_tell_what_they_are(page: Page) -> None:
    """With the mouse and with the keyboard."""
    x, y, tip = page.evaluate(PLACE_OF_MARK)
    assert page.evaluate("document.getElementById('tip').hidden")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait("!document.getElementById('tip').hidden")
    assert page.text("tip") == tip and tip.startswith("full, ")
    assert page.evaluate(INSIDE)
    press(page, "Escape", 27)
    page.wait("document.getElementById('tip').hidden")
    page.evaluate("document.querySelector('#differences .mark').focus()")
    page.wait("document.getElementById('tip').innerText.startsWith('speculative minus full')")
    page.evaluate("document.activeElement.blur()")
    page.wait("document.getElementById('tip').hidden")


def test_paper_shows_what_is_folded_and_no_controls(page: Page) -> None:
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") > 0
    printed = page.call("Page.printToPDF")["data"]
    assert len(printed) > 20_000
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.controls')).display") == "none"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") > 0
    assert page.problems == []
