"""`specontext bench paper` at tiny sizes: every table runs on a CPU, parts are kept and resumed, and errors say what to give."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specontext.cli.paper_report import part_table
from specontext.evaluation.paper.bench import Bench
from specontext.evaluation.paper.results import link, with_ratios

Fails = Callable[..., str]
TINY = ["bench", "paper", "--device", "cpu", "--scale", "tiny"]
ROW = {"part", "model", "column", "prompt", "output", "system", "requests", "tokens_per_s", "over_hf_sdpa", "over_full"}
MEASURED = ROW | {"prefill_s", "decode_s", "step_s", "decode_floor_s", "decode_over_floor", "sampled"}
CLOUD = ["--table", "cloud", "--parts"]


def test_a_column_with_hugging_face_and_ours(run: Any) -> None:
    ran = run(*TINY, *CLOUD, "qwen3-8b/2k-16k/hugging-face,qwen3-8b/2k-16k/search", "--json")
    assert ran.status == 0, ran.stderr
    found = ran.json
    assert found["table"] == "cloud" and found["scale"] == "tiny" and len(found["parts"]) == 2
    rows = found["rows"]
    systems = [row["system"] for row in rows]
    assert systems[:6] == ["hf-sdpa", "full", "hf-eager, 4 requests", "hf-eager", "hf-static", "hf-offloaded"]
    assert systems[6:] == ["hf-sdpa", "full", "ours"]
    assert all(set(row) >= ROW for row in rows)
    for row in rows:
        if "error" in row:
            assert row["system"] == "hf-offloaded" and "GPU" in row["error"] and row["tokens_per_s"] is None
            continue
        assert set(row) >= MEASURED and row["sampled"] and row["decode_over_floor"] > 1
        assert row["tokens_per_s"] == pytest.approx(row["requests"] * row["output"] / (row["prefill_s"] + row["decode_s"]))
        assert [int(length) for length in row["step_s"]] == [32, 32 + 256]
    full, ours = rows[7:]
    assert ours["over_full"] == pytest.approx(ours["tokens_per_s"] / full["tokens_per_s"])
    assert str(ours["requests"]) in ours["searched"] and 0 < ours["choice_over_best"] <= 1
    eager = next(row for row in rows if row["system"] == "hf-eager, 4 requests")
    assert ours["over_hf_eager_4"] == pytest.approx(ours["over_full"] / eager["over_full"])
    assert "over_hf_eager_4" in ours["linked"]


def test_steps_at_one_length_are_not_set_against_whole_columns() -> None:
    """Overlaps are measured at the mean length, decoding alone; Hugging Face's eager system was measured over the column."""

    def row(system: str, rate: float, **work: int) -> dict[str, Any]:
        return {"model": "m", "column": "[2k,32k]", "system": system, "tokens_per_s": rate} | work

    whole, mean = {"prompt": 32, "output": 512}, {"prompt": 288, "output": 0}
    part = with_ratios([row("hf-sdpa", 4.0, **whole), row("hf-eager", 2.0, **whole)])
    same = with_ratios([row("hf-sdpa", 5.0, **whole), row("ours", 50.0, **whole)])
    other = with_ratios([row("hf-sdpa", 5.0, **mean), row("ours, overlap 0.5", 500.0, **mean)])
    rows = link([*part, *same, *other])
    assert rows[3]["over_hf_eager"] == 20 and rows[3]["linked"] == ["over_hf_eager"]
    assert rows[5]["over_hf_sdpa"] == 100 and rows[5]["over_hf_eager"] is None and "linked" not in rows[5]


def test_a_whole_run_is_set_against_the_sampled_one(run: Any) -> None:
    found = run(*TINY, *CLOUD, "qwen3-8b/16k-2k/whole-run", "--json").json
    sampled, whole = found["rows"][-2:]
    assert not whole["sampled"] and whole["requests"] == sampled["requests"]
    assert found["sampled_over_whole"] == [pytest.approx(sampled["tokens_per_s"] / whole["tokens_per_s"])]


@pytest.mark.parametrize(
    ("table", "part", "systems"),
    [
        ("cloud", "qwen3-8b/32k-2k/methods", ["hf-sdpa", "full", "quest", "shadowkv", "ours", "ours, eager"]),
        ("single", "llama-3.1-8b/4k", ["hf-sdpa", "full", "ours"]),
        ("edge", "llama-3.2-1b/16k-2k", ["hf-sdpa", "full", "hf-eager", "ours"]),
        ("ablation", "llama-3.1-8b/2k-16k/eager", ["hf-sdpa", "full", "C1", "C1+C2", "C1+C2+C3"]),
        ("ablation", "llama-3.1-8b/2k-16k/captured", ["hf-sdpa", "full", "C1+C2+C3", "+ slots", "+ graphs"]),
        ("concurrency", "llama-3.1-8b/4k", ["full", "full", "ours", "ours"]),
    ],
)
def test_parts_of_every_table(run: Any, table: str, part: str, systems: list[str]) -> None:
    rows = run(*TINY, "--table", table, "--parts", part, "--json").json["rows"]
    assert [row["system"] for row in rows] == systems
    assert all(row["tokens_per_s"] > 0 for row in rows)
    for row in rows:
        assert row["over_full"] > 0 and (row["system"] != "full" or row["over_full"] == 1)
    if table == "concurrency":
        assert [row["concurrency"] for row in rows] == [1, 4, 1, 4]
    if table == "ablation" and "C1" in systems:
        away = [list(row["offloaded_layers"].values()) for row in rows[2:]]
        assert away[0] == away[1] == [4, 4] and away[2] != [4, 4]


def test_parts_are_kept_and_not_run_again(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, "--table", "single", "--parts", "llama-3.1-8b/2k", "--out", tmp_path, "--json"]
    first = run(*words)
    [file] = tmp_path.iterdir()
    assert "measuring" in first.stderr and json.loads(file.read_text())["part"] == "llama-3.1-8b/2k"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr("specontext.evaluation.paper.results.open_bench", refuse)
    again = run(*words)
    assert again.json == first.json and "kept" in again.stderr
    with pytest.raises(AssertionError):
        run(*words, "--overlap", "0.5")
    file.write_text("{")
    with pytest.raises(AssertionError):
        run(*words)


def test_a_part_that_was_broken_off_goes_on_where_it_was(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before a kill, and what was searched for, is not measured again; other settings begin anew."""
    words = [*TINY, "--table", "cloud", "--parts", "qwen3-8b/2k-16k/ours", "--out", tmp_path, "--json"]
    asked: list[str] = []

    def watch(name: str, dies: bool) -> None:
        act = getattr(Bench, name)

        def watched(self: Bench, way: Any, *rest: Any) -> Any:
            asked.append(f"{name} {way.name}")
            if dies and way.name == "ours":
                raise KeyboardInterrupt
            return act(self, way, *rest)

        monkeypatch.setattr(Bench, name, watched)

    with monkeypatch.context() as monkeypatch:
        for name in ("ours", "theirs", "most_of_theirs"):
            watch(name, dies=True)
        run(*words)
    assert asked == ["most_of_theirs hf-sdpa", "theirs hf-sdpa", "ours full", "ours ours"]
    assert [file.name for file in tmp_path.iterdir()] == ["qwen3-8b_2k-16k_ours.progress"]
    asked.clear()
    with monkeypatch.context() as monkeypatch:
        for name in ("ours", "theirs", "most_of_theirs"):
            watch(name, dies=False)
        found = run(*words)
    assert asked == ["ours ours"] and "2 numbers are there" in found.stderr
    assert [row["system"] for row in found.json["rows"]] == ["hf-sdpa", "full", "ours"]
    assert all(row["tokens_per_s"] and row["over_full"] for row in found.json["rows"])
    kept = json.loads((tmp_path / "qwen3-8b_2k-16k_ours.json").read_text())
    assert kept["resumed"] == 2 and kept["seconds"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["qwen3-8b_2k-16k_ours.json"]
    asked.clear()
    with monkeypatch.context() as monkeypatch:
        watch("most_of_theirs", dies=False)
        run(*[word if word != "qwen3-8b/2k-16k/ours" else "qwen3-8b/2k-16k/methods" for word in words])
    assert asked == [], "another part of the column knows what was searched for"


def test_parts_that_there_is_no_time_for_are_left(run: Any, tmp_path: Path) -> None:
    words = [*TINY, "--table", "single", "--parts", "llama-3.1-8b/2k,llama-3.1-8b/4k", "--out", tmp_path, "--minutes", 1e-6]
    first = run(*words, "--json")
    assert first.json["parts"] == ["llama-3.1-8b/2k"] and first.json["left"] == ["llama-3.1-8b/4k"]
    assert "left for another time: 1 part" in first.stderr
    again = run(*words, "--json")
    assert again.json["parts"] == ["llama-3.1-8b/2k", "llama-3.1-8b/4k"] and again.json["left"] == []


def test_what_matters_most_comes_first(run: Any) -> None:
    listed = [one["part"] for one in run("bench", "paper", "--table", "cloud", "--list-parts", "--json").json]
    ends = [part.rsplit("/", 1)[1] for part in listed]
    assert listed[:2] == ["r1-distill-llama-8b/2k-16k/ours", "r1-distill-llama-8b/2k-16k/hugging-face"]
    assert set(ends[:16]) == {"ours", "hugging-face"} and set(ends[16:26]) == {"search", "whole-run"}


def test_for_people_and_as_a_picture(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ran = run(*TINY, "--table", "single", "--parts", "llama-3.1-8b/2k,llama-3.1-8b/4k", "--plot", tmp_path / "a.png")
    assert ran.status == 0 and "minutes" not in ran.stderr, "what a part takes is known at full size only"
    for words in ("llama-3.1-8b/4k", "hf-sdpa", "tokens/s", "x full", "trapezoidal", "0.85"):
        assert words in ran.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_parts_are_listed_with_their_commands(run: Any) -> None:
    listed = run("bench", "paper", "--table", "cloud", "--device", "cuda", "--list-parts", "--json").json
    assert len(listed) == len({one["part"] for one in listed}) == 36 and all(0 < one["minutes"] <= 3 for one in listed)
    assert any(one["command"].endswith(" --parts qwen3-8b/2k-16k/ours") for one in listed)
    capped = run(
        "bench", "paper", "--table", "cloud", "--gpu-memory", "72GiB", "--out", "my results", "--list-parts", "--json"
    ).json
    assert all("--out 'my results' --gpu-memory 72GiB --parts" in one["command"] for one in capped)
    shown = run("bench", "paper", "--table", "cloud", "--list-parts", "--model", "qwen3-8b", "--parts", "qwen3-8b/2k-32k")
    assert len(shown.stdout.splitlines()) == 5 and "minutes" in shown.stdout


@pytest.mark.parametrize(
    ("words", "says", "status"),
    [
        (["--table", "clouds"], "cloud, single", 2),
        (["--table", "cloud", "--scale", "small"], "full, tiny", 2),
        (["--table", "cloud", "--overlap", "2"], "--overlap", 2),
        (["--table", "cloud", "--minutes", "5"], "--out", 2),
        (["--table", "cloud", "--minutes", "0", "--out", "somewhere"], "above 0", 2),
        (["--table", "cloud", "--plot", "a.gif"], ".png", 2),
        (["--table", "cloud", "--parts", "nothing"], "--list-parts", 1),
        (["--table", "cloud", "--device", "cpu", "--gpu-memory", "72GiB"], "of a GPU", 2),
        (["--table", "cloud", "--gpu-memory", "much"], "much", 2),
        (["--table", "edge", "--model", "qwen3-8b"], "llama-3.2-1b", 1),
        (["--table", "edge", "--model", "llama-3.2-1b", "--model", "llama-9b"], "no model 'llama-9b'", 1),
        (["--table", "cloud", "--list-parts", "--minutes", "5"], "leave out --minutes", 2),
        (["--table", "cloud", "--list-parts", "--plot", "a.png"], "measures nothing", 2),
        (["--table", "single", "--device", "tpu", "--scale", "tiny"], "auto, cpu, cuda", 2),
        (["--table", "single", "--host-memory", "24G"], "24GiB", 2),
    ],
)
def test_bad_options(fails: Fails, words: list[str], says: str, status: int) -> None:
    assert says in fails(["bench", "paper", *words], status=status)


def test_results_that_cannot_be_kept(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = [*TINY, "--table", "single", "--parts", "llama-3.1-8b/2k", "--out", tmp_path / "file" / "results"]
    said = fails(words, status=1)
    assert "cannot be kept" in said and "measuring" not in said


def test_why_a_system_was_not_measured_stands_below_the_table() -> None:
    row = {"part": "a", "system": "hf-offloaded", "requests": None, "error": "its offloaded cache needs a GPU"}
    out = io.StringIO()
    Console(width=60, file=out).print(part_table("a", [row]))
    assert "hf-offloaded: its offloaded cache needs a GPU" in out.getvalue()
