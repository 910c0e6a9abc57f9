"""Reports follow the numbers, whatever shape the results have."""

from __future__ import annotations

import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from specontext.evaluation.report import ReportError, write_report
from specontext.evaluation.report.averages import mean_over_tasks, mean_pairs, seen_from
from specontext.evaluation.report.methods import describe, marks_of
from specontext.evaluation.report.pictures import pareto_front
from specontext.evaluation.report.results import read_results
from specontext.evaluation.report.statements import Statement, opening
from specontext.retrieval.registry import CHOICES
from tests.evaluation.made_results import SCORES, made_pair, made_results, made_row, made_selections, write

SPECULATIVE_AND_FULL = [made_row("full", None), made_row("speculative", 512)]


def said(rows: list[dict[str, Any]], pairs: list[dict[str, Any]] | None = None) -> list[Statement]:
    return opening(read_results({"meta": {"model": "nano"}, "rows": rows, "pairs": pairs or []}))


def answer(rows: list[dict[str, Any]], pairs: list[dict[str, Any]] | None = None) -> str:
    [found] = [statement for statement in said(rows, pairs) if statement.kind == "answer"]
    return "\n".join([found.text, *found.items]).replace("\u00a0", " ")


def of_kind(statements: list[Statement], kind: str) -> list[Statement]:
    return [statement for statement in statements if statement.kind == kind]


def html_of(folder: Path, results: Any, selections: Any = None) -> str:
    html, _ = write_report(write(folder, results, selections))
    return html.read_text()


# Statements ---------------------------------------------------------------------------------------------------------------------


def test_the_answer_is_computed_from_the_cell_at_an_eighth_of_the_longest_context() -> None:
    rows = [*SPECULATIVE_AND_FULL, made_row("speculative", 128, score=0.5), made_row("speculative", 512, 1024, score=0.6)]
    text = answer(rows, [made_pair("speculative", "full", -0.03, 0.01)])
    assert (
        "With 512 of 4,096 tokens read (12.5 % of the context), speculative scores 91.0 % (95 % interval [86.0, 96.0 %])" in text
    )
    assert "Full attention scores 92.0 %: speculative keeps 98.9 % of that (95 % interval [96.7, 101.1 %])" in text
    assert "A difference between the two is not shown: it is −1.0 points [−3.0, +1.0], so a loss of up to 3.0 points" in text


@pytest.mark.parametrize(
    ("low", "high", "expected", "never"),
    [
        (-0.05, -0.01, "It loses accuracy: the paired difference is −3.0 points [−5.0, −1.0]", "not shown"),
        (0.01, 0.05, "It scores higher than full attention", "not shown"),
        (-0.05, 0.0, "A difference between the two is not shown", "loses"),
        (0.0, 0.0, "scored the same on every one of the 20 problems; with 20 of a task, differences on up to 15.0 %", "loses"),
    ],
)
def test_nothing_is_claimed_that_the_interval_does_not_support(low: float, high: float, expected: str, never: str) -> None:
    text = answer(SPECULATIVE_AND_FULL, [made_pair("speculative", "full", low, high)])
    assert expected in text and never not in text


def test_problems_that_full_attention_cannot_solve_tell_nothing() -> None:
    rows = [made_row("full", None, score=0.0, ci_low=0.0, ci_high=0.0), made_row("speculative", 512, score=0.0)]
    text = answer(rows, [made_pair("speculative", "full", 0.0, 0.0)])
    assert "It solves none of these problems itself, so they cannot tell what reading less costs." in text
    assert "keeps" not in text and "the same on every" not in text


def test_without_pairs_nothing_is_said_about_differences() -> None:
    text = answer(SPECULATIVE_AND_FULL)
    assert "not compared problem by problem" in text and "nothing is said here about which method is better" in text
    assert not of_kind(said(SPECULATIVE_AND_FULL), "good") and not of_kind(said(SPECULATIVE_AND_FULL), "worse")


def test_other_methods_are_judged_by_their_paired_intervals_whichever_way_round() -> None:
    pairs = [
        made_pair("quest", "speculative", -0.2, -0.1),
        made_pair("speculative", "streaming", -0.1, 0.1),
        made_pair("snapkv", "speculative", 0.01, 0.05),
        made_pair("speculative", "h2o", -0.2, -0.1, budget=128),
    ]
    text = answer([*SPECULATIVE_AND_FULL, *(made_row(method, 512) for method in ("quest", "streaming", "snapkv"))], pairs)
    assert "better than quest: +15.0 points [+10.0, +20.0]" in text
    assert "no difference shown to streaming: 0.0 points [−10.0, +10.0]" in text
    assert "worse than snapkv: −3.0 points [−5.0, −1.0]" in text and "h2o" not in text


def test_every_interval_below_zero_is_listed_real_methods_before_the_oracle() -> None:
    pairs = [
        made_pair("speculative", "oracle", -0.3, -0.2),
        made_pair("quest", "speculative", 0.01, 0.03, budget=128),
        made_pair("speculative", "full", -0.1, 0.1),
        made_pair("quest", "streaming", -0.5, -0.4),
    ]
    statements = said([*SPECULATIVE_AND_FULL, made_row("quest", 128), made_row("oracle", 512)], pairs)
    [worse] = of_kind(statements, "worse")
    assert "in 2 of 3 comparisons of speculative with another method on one task" in worse.text
    assert worse.items == (
        "than quest, needle, 4,096 tokens, budget 128: −2.0 points [−3.0, −1.0]",
        "than oracle (an upper bound, no method to use), needle, 4,096 tokens, budget 512: −25.0 points [−30.0, −20.0]",
    )
    assert not of_kind(statements, "good")


def test_an_interval_that_touches_zero_is_no_loss() -> None:
    statements = said(SPECULATIVE_AND_FULL, [made_pair("speculative", "full", -0.2, 0.0)])
    assert not of_kind(statements, "worse")
    assert "In none of 1 comparison" in of_kind(statements, "good")[0].text


def test_a_loss_of_the_mean_over_tasks_comes_first_and_chance_is_named() -> None:
    tasks = [f"task{number}" for number in range(64)]
    rows = [made_row(method, budget, task=task) for task in tasks for method, budget in (("full", None), ("speculative", 512))]
    pairs = [made_pair("speculative", "full", -0.07, 0.05 if task != "task3" else -0.01, task=task) for task in tasks]
    [worse] = of_kind(said(rows, pairs), "worse")
    assert worse.items[0].startswith("than full, mean over 64 tasks, 4,096 tokens, budget 512: −1.")
    assert worse.items[1].startswith("than full, task3") and len(worse.items) == 2
    assert "(by chance alone some 2 of those on one task would be)" in worse.text


@pytest.mark.parametrize("rows", [[made_row("quest", 512)], [made_row("full", None)], [made_row("random", 64, None, n=1)]])
def test_one_row_is_a_report(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    html = html_of(tmp_path, {"rows": rows})
    assert rows[0]["method"] in html and "Accuracy against tokens read" in html
    assert answer(rows)


def test_without_full_attention_it_is_not_spoken_of() -> None:
    text = answer([made_row("speculative", 512), made_row("quest", 512)], [made_pair("speculative", "quest", 0.1, 0.2)])
    assert "Full attention" not in text and "better than quest" in text


def test_lengths_of_data_sets_come_from_what_full_attention_read() -> None:
    rows = [
        made_row("full", None, None, tokens_read=8000.0),
        made_row("speculative", 512, None),
        made_row("speculative", 1024, None),
    ]
    assert "With 1,024 of about 8,000 tokens read" in answer(rows)


def test_a_head_of_one_s_own_may_be_the_main_method() -> None:
    results = read_results({"rows": [made_row("quest", 512), made_row("speculative@heads/mine", 512)]})
    assert results.main == "speculative@heads/mine"
    assert "with the retrieval head heads/mine" in (describe(results.main) or "")


# Means and the Pareto front -----------------------------------------------------------------------------------------------------


def test_means_weigh_tasks_equally_and_combine_their_intervals() -> None:
    rows = [
        made_row("full", None, task="a", score=0.8, ci_low=0.7, ci_high=0.9, n=10),
        made_row("full", None, task="b", score=0.4, ci_low=0.4, ci_high=0.6, n=90, attention_recall=None),
    ]
    [mean], partial = mean_over_tasks(read_results({"rows": rows}).rows)
    assert not partial and mean["tasks"] == 2 and mean["n"] == 100
    assert mean["score"] == pytest.approx(0.6)
    assert mean["ci_low"] == pytest.approx(0.6 - 0.1 / 2)
    assert mean["ci_high"] == pytest.approx(0.6 + math.hypot(0.1, 0.2) / 2)
    assert mean["attention_recall"] is None


def test_a_cell_without_a_task_gets_no_mean_and_is_named(tmp_path: Path) -> None:
    rows = [
        made_row("full", None, task="a"),
        made_row("full", None, task="b"),
        made_row("speculative", 512, task="a"),
        made_row("speculative", 128, task="a"),
        made_row("speculative", 128, task="b", score=None, ci_low=None, ci_high=None),
    ]
    means, partial = mean_over_tasks(read_results({"rows": rows}).rows)
    assert [mean["method"] for mean in means] == ["full"]
    assert [(cell["budget"], cell["missing"]) for cell in partial] == [(512, ["b"]), (128, ["b"])]
    html = html_of(tmp_path, {"rows": rows})
    assert "speculative, budget 512, 4,096 tokens (without b)" in html
    assert "speculative, budget 128, b, 4,096 tokens" in html  # a row without a score
    assert "speculative, budget 512, b, 4,096 tokens" in html  # a cell that was not run
    assert "no method has" not in html


def test_pairs_are_turned_and_counted_once() -> None:
    pairs = read_results({"rows": [], "pairs": [made_pair("a", "b", -0.1, 0.3), made_pair("b", "a", -0.3, 0.1)]}).pairs
    [pair] = seen_from("a", pairs)
    assert (pair["other"], pair["ci_low"], pair["ci_high"]) == ("b", -0.1, 0.3)
    further = {"differences.kl.mean": 0.3, "differences.kl.low": 0.2, "differences.kl.high": 0.5}
    [turned] = seen_from("b", [pairs[0] | further])
    assert [turned[f"differences.kl.{name}"] for name in ("mean", "low", "high")] == [-0.3, -0.5, -0.2]
    [pair] = seen_from("b", pairs[:1])
    assert (pair["other"], pair["difference"], pair["ci_low"], pair["ci_high"]) == ("a", pytest.approx(-0.1), -0.3, 0.1)


def test_mean_differences_need_all_tasks() -> None:
    pairs = [
        made_pair("a", "b", 0.0, 0.2, task="x"),
        made_pair("a", "b", 0.0, 0.2, task="y"),
        made_pair("a", "c", 0, 1, task="x"),
    ]
    [mean] = mean_pairs(read_results({"rows": [], "pairs": pairs}).pairs)
    assert mean["other"] == "b" and mean["ci_high"] == pytest.approx(0.1 + 0.1 * math.sqrt(2) / 2)


def test_the_front_holds_what_no_other_cell_beats_and_no_oracle() -> None:
    rows = [
        made_row("speculative", 128, score=0.7),
        made_row("quest", 128, score=0.6),
        made_row("speculative", 256, score=0.7),
        made_row("quest", 512, score=0.8),
        made_row("oracle", 64, score=0.9),
        made_row("full", None, score=0.8),
        made_row("streaming", 32, score=None),
    ]
    assert [(row["method"], row["budget"]) for row in pareto_front(rows)] == [("speculative", 128), ("quest", 512)]


# What is written ----------------------------------------------------------------------------------------------------------------


def test_both_files_hold_the_same_tables_and_statements(tmp_path: Path) -> None:
    html, markdown = write_report(write(tmp_path, made_results(), made_selections()))
    assert [html.name, markdown.name] == ["report.html", "report.md"]
    page, text = Reading.of(html.read_text()), markdown.read_text()
    unescaped = re.sub(r"\\(.)", r"\1", text)
    assert len(page.tables) >= 7
    for title, rows in page.tables:
        assert title in unescaped
        for row in rows:
            assert "| " + " | ".join(cell.replace("\u00a0", " ") for cell in row) + " |" in unescaped
    for part in page.paragraphs:
        assert " ".join(part.split()) in unescaped.replace("**", "")


def test_the_same_results_give_the_same_report(tmp_path: Path) -> None:
    first = [file.read_bytes() for file in write_report(write(tmp_path, made_results(), made_selections()))]
    assert first == [file.read_bytes() for file in write_report(tmp_path)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.md", "results.json", "selections.json"]


def test_the_file_needs_nothing_else_and_its_pictures_can_be_read(tmp_path: Path) -> None:
    html = html_of(tmp_path, made_results(), made_selections())
    assert not re.search(r"\ssrc=|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")", html)
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) == {"http://www.w3.org/2000/svg"}
    pictures = re.findall(r"<figure>(<svg.*?</svg>)</figure>", html, re.DOTALL)
    assert len(pictures) == 2 + 2 + 4  # accuracy and differences of two lengths, recall and overlap of two budgets
    for picture in map(ET.fromstring, pictures):
        assert picture.findtext("title") and len(picture.findtext("desc") or "") > 60
        marks = [node for node in picture.iter("g") if node.get("class", "").startswith("mark ")]
        assert marks and all(mark.get("aria-label") == mark.get("data-tip") and mark.get("tabindex") == "0" for mark in marks)
        width = float(picture.get("viewBox", "").split()[2])
        places = [float(node.get(name, "")) for node in picture.iter("circle") for name in ("cx",)]
        assert all(0 <= place <= width for place in places)
    identities = re.findall(r' id="([^"]+)"', html)
    assert len(identities) == len(set(identities))


def test_texts_of_the_data_are_texts(tmp_path: Path) -> None:
    bad = '</script><script>alert("x")</script> | `*_ & '
    results = made_results(tasks=(bad, "other"))
    results["meta"] |= {"model": bad, "command": bad, "skipped": [{"task": bad, "why": bad}], bad: bad}
    for row in results["rows"]:
        row[f"scores{bad}"] = bad
    html, markdown = write_report(write(tmp_path, results, made_selections([bad] * 8)))
    page = Reading.of(html.read_text())
    assert "alert(" not in page.scripts.replace('alert(\\"x\\")', "")  # only in the record of selections, as data
    assert any(bad.strip() in cell for _, rows in page.tables for row in rows for cell in row)
    assert json.loads(page.data)["texts"][0] == bad
    lines = [line for line in markdown.read_text().splitlines() if "alert" in line and not line.startswith("</script>")]
    assert lines and not any(re.search(r"(?<!\\)<", line) for line in lines)


def test_what_is_not_there_is_a_dash(tmp_path: Path) -> None:
    missing = dict.fromkeys(("overlap", "attention_recall", "selection_bytes", "seconds"), None)
    rows = [made_row("speculative", 512, **missing), made_row("full", None, score=float("nan"), ci_low=float("nan"), overlap=0.5)]
    html = html_of(tmp_path, {"rows": rows})
    [(_, table), *_] = Reading.of(html).tables
    assert "attention recall" in table[0] and "wall time / problem" in table[0]  # full attention has them
    assert table[1][table[0].index("score")] == "–" and table[2][table[0].index("overlap")] == "–"
    assert not re.search(r"\bnan\b|\bNone\b|\bnull\b", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))


def test_columns_and_tasks_that_nobody_knows_are_shown(tmp_path: Path) -> None:
    rows = [
        made_row(
            "speculative", 512, None, "prose", suite="fidelity", score=None, ci_low=None, ci_high=None, kl=0.0123, layers="0-3"
        ),
        made_row("full", None, None, "prose", suite="fidelity", scores={"perplexity": 7.25, "lines": {"a": 1}}),
    ]
    tables = Reading.of(html_of(tmp_path, {"rows": rows})).tables
    [table] = [rows for title, rows in tables if title == "fidelity, prose"]
    assert table[0][-5:] == ["perplexity", "lines.a", "kl", "layers", "on the front"]
    by_method = {row[0]: row for row in table[1:]}
    assert by_method["speculative"][-5:-1] == ["–", "–", "0.0123", "0-3"] and by_method["full"][-5:-3] == ["7.25", "1"]


@pytest.mark.parametrize("skipped", [["no data"], {"words": "too short"}, "nothing fits", [{"task": "a", "why": "b"}, "c"]])
def test_what_was_skipped_is_shown_in_any_shape(tmp_path: Path, skipped: Any) -> None:
    html = html_of(tmp_path, {"meta": {"skipped": skipped}, "rows": [made_row("full", None)]})
    words = re.findall(r"[a-z ]+", json.dumps(skipped))
    section = html.split('id="missing"')[1].split("</section>")[0]
    assert all(word in section for word in words if word not in ("task", "why") and word.strip())


def test_a_reason_is_said_once_with_all_its_places(tmp_path: Path) -> None:
    why = "skipped: the model's contexts end at 4,096 tokens"
    notes = [{"suite": "ruler", "task": task, "length": n, "why": why} for task in ("vt", "cwe") for n in (8192, 16384)]
    notes += [{"suite": "longbench", "task": "qasper", "why": why}, {"suite": "ruler", "task": "vt", "why": "other words"}]
    rows = [made_row("full", None, task=task, length=n) for task, n in (("a", 1000), ("b", 1000), ("b", 2000))]
    rows += [made_row("quest", 64, task="a", length=1000)]
    html = html_of(tmp_path, {"meta": {"notes": notes}, "rows": rows})
    section = html.split('id="missing"')[1].split("</section>")[0]
    assert section.count("contexts end at") == 1 and section.count("other words") == 1
    assert "ruler vt and cwe, 8,192 and 16,384 tokens; longbench qasper" in section
    assert "quest, budget 64, b, 1,000 and 2,000 tokens" in section


def test_long_outputs_are_compared_with_full_attention_s(tmp_path: Path) -> None:
    rows = [
        made_row("full", None, output_tokens=200.0, answer_seconds=4.0),
        made_row("speculative", 512, output_tokens=250.0, answer_seconds=3.0),
    ]
    tables = dict(Reading.of(html_of(tmp_path, {"rows": rows})).tables)
    table = tables["ruler: amounts beside those of full attention"]
    assert table[2][2:] == ["250", "1.25 ×", "3.0 s", "0.75 ×"]
    assert 'id="answers"' not in html_of(tmp_path, made_results())


def test_how_it_was_made_stands_in_it(tmp_path: Path) -> None:
    html = html_of(tmp_path, made_results())
    assert '<pre tabindex="0">specontext eval nano --suite ruler -o out</pre>' in html
    tables = dict(Reading.of(html).tables)
    assert ["versions.torch", "2.8"] in tables["What it was made with"]


def test_thirteen_methods_and_tasks_stay_small_and_apart(tmp_path: Path) -> None:
    results = made_results(tasks=[f"task{number}" for number in range(13)], lengths=(1024, 2048, 4096))
    for task in range(13):
        for method in sorted(set(CHOICES) - set(SCORES)):
            results["rows"] += [made_row(method, 512, length, f"task{task}") for length in (1024, 2048, 4096)]
    html = html_of(tmp_path, results)
    assert len(html) < 2_500_000 and all(method in html for method in CHOICES)


def test_marks_differ(tmp_path: Path) -> None:
    methods = [*CHOICES, *(f"new{number}" for number in range(20))]
    marks = marks_of(methods)
    assert len({(mark.colour, mark.shape) for mark in marks.values()}) == len(methods)
    assert marks_of(["new0", "quest"])["quest"] == marks["quest"]


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_told_from_the_page(dark: bool, tmp_path: Path) -> None:
    blocks = re.findall(r":root \{(.*?)\}", html_of(tmp_path, made_results()), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", blocks[1 if dark else 0]))
    for name in [f"c{number}" for number in range(7)]:
        assert contrast(colours[name], colours["card"]) > 3.5, name
    for name, back in (("ink", "card"), ("soft", "card"), ("soft", "page"), ("ink", "worse-back"), ("ink", "answer-back")):
        assert contrast(colours[name], colours[back]) > 4.5, (name, back)
    assert contrast(colours["worse"], colours["card"]) > 4.5 and contrast(colours["better"], colours["card"]) > 4.5


# What is no evaluation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], 'a list "rows"'),
        ({"rows": {}}, 'a list "rows"'),
        ({"rows": [1]}, "row 1 is no object"),
        ({"rows": [made_row("full", None), {"task": "a"}]}, 'row 2 has no "suite"'),
        ({"rows": [made_row("full", None, score="high")]}, '"score" must be a number'),
        ({"rows": [], "pairs": 5}, '"pairs" a list'),
        ({"rows": [], "meta": [1]}, '"meta" must be an object'),
        ({"rows": [], "pairs": [{"suite": "a", "task": "b", "method": "c"}]}, 'pair 1 has no "other"'),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, results: Any, message: str) -> None:
    with pytest.raises(ReportError, match=re.escape(message)):
        write_report(write(tmp_path, results))
    assert not (tmp_path / "report.html").exists()


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no results\.json.*specontext eval"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ReportError, match=r"cannot be read \(.*: mend it, or run"):
        write_report(tmp_path)
    for damage in ({"format": 0}, {"steps": [1]}, {"steps": {}}):
        write(tmp_path, made_results(), copy.deepcopy(made_selections()) | damage)
        with pytest.raises(ReportError, match="record it again"):
            write_report(tmp_path)


def test_selections_alone_are_a_report(tmp_path: Path) -> None:
    html = html_of(tmp_path, None, made_selections())
    assert "What the heads read" in html and "What was compared" not in html and "75.0\u00a0% of the true attention" in html


class Reading(HTMLParser):
    """Tables (title, rows) and paragraphs of a report, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.paragraphs: list[str] = []
        self.scripts, self.data, self._open = "", "", [""]

    @classmethod
    def of(cls, html: str) -> Reading:
        reading = cls()
        reading.feed(re.sub(r"<table id=.*?</table>", "", html, flags=re.DOTALL))  # that one is filled by a script
        reading.paragraphs = [text for text in reading.paragraphs if text.strip()]
        return reading

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append(("", []))
        elif tag == "tr" and self.tables:
            self.tables[-1][1].append([])
        elif tag in ("th", "td") and self.tables:
            self.tables[-1][1][-1].append("")
        elif tag == "p":
            self.paragraphs.append("")
        self._open.append("data" if tag == "script" and ("id", "selections") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        while len(self._open) > 1 and self._open.pop() not in (tag, "data"):
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1]
        if inside == "caption" and self.tables and not self.tables[-1][1]:
            self.tables[-1] = (data, [])
        elif inside in ("th", "td"):
            self.tables[-1][1][-1][-1] += data
        elif "p" in self._open:
            self.paragraphs[-1] += data
        elif inside == "script":
            self.scripts += data
        elif inside == "data":
            self.data += data


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
