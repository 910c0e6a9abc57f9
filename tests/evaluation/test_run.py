"""Whole evaluations with the bundled model at small lengths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from specontext import LLM, SamplingParams
from specontext.evaluation.run import Advance, open_folder, run_evaluation
from specontext.evaluation.samples import FILE, EvaluationError, SampleFile
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.suites.longwriter_judge import Judge
from specontext.locations import NANO
from specontext.tasks import sample_problems

TASKS = ("niah_single", "niah_multivalue")
METHODS = ("full", "speculative", "random")
SEATS = 4


def silently(phase: str, parts: int) -> Advance:
    return lambda done: None


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSettings:
    return EvaluationSettings(
        "nano",
        ("ruler",),
        tmp_path_factory.mktemp("evaluation") / "new" / "out",
        methods=METHODS,
        budgets=(32, 64, 512),
        lengths=(256, 99_999),
        limit=6,
        tasks=TASKS,
        seed=5,
        engine={"device": "cpu", "max_num_seqs": SEATS, "max_model_len": 512},
        command="specontext eval first",
    )


@pytest.fixture(scope="module")
def results(settings: EvaluationSettings) -> dict[str, Any]:
    return run_evaluation(settings, silently)


@pytest.fixture
def copied(settings: EvaluationSettings, results: dict[str, Any], tmp_path: Path) -> EvaluationSettings:
    """The same evaluation in a directory of the test's own, with all results."""
    shutil.copytree(settings.out, tmp_path / "out")
    return replace(settings, out=tmp_path / "out")


def test_every_method_answers_every_problem(results: dict[str, Any], settings: EvaluationSettings) -> None:
    assert json.loads((settings.out / "results.json").read_text()) == results
    cells = {(row["task"], row["method"], row["budget"]): row for row in results["rows"]}
    choices = [("full", None), *((method, budget) for method in METHODS[1:] for budget in (32, 64))]
    assert set(cells) == {(task, *choice) for task in TASKS for choice in choices}
    for (_, method, budget), row in cells.items():
        assert (row["suite"], row["length"], row["n"]) == ("ruler", 256, 6)
        assert row["tokens_read"] == pytest.approx(budget) if method != "full" else 200 < row["tokens_read"] < 256
        assert 0 <= row["ci_low"] <= row["score"] <= row["ci_high"] <= 1
        assert row["output_tokens"] > 3 and row["seconds"] > 0 and row["bytes_loaded"] == 0
    assert cells["niah_single", "full", None]["score"] == cells["niah_single", "speculative", 64]["score"] == 1
    assert cells["niah_multivalue", "random", 32]["score"] < 0.7
    others = {(pair["method"], pair["other"]) for pair in results["pairs"]}
    assert others == {("speculative", "full"), ("speculative", "random"), ("random", "full")}
    assert all(pair["n"] == 6 for pair in results["pairs"])


def test_meta_says_what_was_run_and_what_was_not(results: dict[str, Any]) -> None:
    meta = results["meta"]
    assert {
        "model": "nano",
        "head": "auto",
        "command": "specontext eval first",
        "seed": 5,
        "suite": ["ruler"],
    }.items() <= meta.items()
    assert {"date", "machine", "versions", "settings"} <= set(meta)
    skipped = [note for note in meta["notes"] if "skipped" in note["why"]]
    assert {note.get("length") for note in skipped} == {256, 99_999}
    assert all("512 tokens" in note["why"] for note in skipped if note["length"] == 99_999)
    assert [note["budget"] for note in skipped if note["length"] == 256] == [512]


def test_answers_are_those_of_the_engine_by_itself(settings: EvaluationSettings, results: dict[str, Any]) -> None:
    llm = LLM("nano", device="cpu", max_model_len=512, methods=("random",))
    count = lambda text: len(llm.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    (problem,) = sample_problems("niah_multivalue", length=256, seed=5, n=1, count_tokens=count)
    (output,) = llm.generate(problem.prompt, SamplingParams(temperature=0.0, seed=5, max_tokens=40, method="random", budget=32))
    found = [line for line in lines(settings.out) if (line["task"], line["key"]) == ("niah_multivalue", "5-0")]
    (line,) = [line for line in found if (line["method"], line["budget"]) == ("random", 32)]
    assert line["output"] == output.text
    assert line["stats"]["decode_steps"] == output.stats["decode_steps"]


def test_a_stopped_run_goes_on(copied: EvaluationSettings, results: dict[str, Any]) -> None:
    whole = (copied.out / FILE).read_text().splitlines(keepends=True)
    kept = whole[: len(whole) * 2 // 3]
    (copied.out / FILE).write_text("".join(kept) + whole[-1][:30])
    done: list[int] = []
    again = run_evaluation(copied, lambda phase, parts: done.append if phase == "answering" else silently(phase, parts))
    text = (copied.out / FILE).read_text().splitlines(keepends=True)
    assert text[: len(kept)] == kept and len(text) == len(whole)
    assert sum(done) == len(whole)
    stable = ("task", "method", "budget", "n", "score", "ci_low", "ci_high", "tokens_read", "overlap")
    as_set = lambda rows: {tuple(row[name] for name in stable) for row in rows}  # noqa: E731
    assert as_set(again["rows"]) == as_set(results["rows"])


def test_what_is_there_is_not_run_again_and_more_can_be_added(
    copied: EvaluationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    generate = LLM.generate

    def counted(self: LLM, prompts: Any, params: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(LLM, "generate", counted)
    before = (copied.out / FILE).read_bytes()
    run_evaluation(copied, silently)
    assert not asked and (copied.out / FILE).read_bytes() == before
    more = replace(copied, methods=("streaming",), budgets=(64,), command="specontext eval second")
    skipped = json.loads((copied.out / "results.json").read_text())["meta"]["notes"]
    results = run_evaluation(more, silently)
    assert all(note in results["meta"]["notes"] for note in skipped)
    assert sum(asked) == 2 * (6 + 6)  # prompts first, so that they are in no method's time
    assert {row["method"] for row in results["rows"]} == {*METHODS, "streaming"}
    assert ("streaming", "full") in {(pair["method"], pair["other"]) for pair in results["pairs"]}
    assert results["meta"]["command"] == "specontext eval first && specontext eval second"


def test_an_interrupted_run_leaves_results_that_are_whole(settings: EvaluationSettings, tmp_path: Path) -> None:
    small = replace(settings, out=tmp_path, limit=2, budgets=(64,), lengths=(256,))

    def stopping(phase: str, parts: int) -> Advance:
        left = [7]

        def advance(done: int) -> None:
            left[0] -= done
            if phase == "answering" and left[0] < 0:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        run_evaluation(small, stopping)
    partial = json.loads((tmp_path / "results.json").read_text())
    assert {row["task"] for row in partial["rows"]} == {"niah_single"}
    assert len(partial["rows"]) == 3
    assert len(run_evaluation(small, silently)["rows"]) == 6


def test_a_head_of_its_own(settings: EvaluationSettings, tmp_path: Path) -> None:
    own = f"speculative@{NANO / 'retrieval_head'}"
    asked = replace(settings, out=tmp_path, methods=("speculative", own), budgets=(32,), lengths=(256,), limit=2)
    results = run_evaluation(asked, silently)
    assert {row["method"] for row in results["rows"]} == {"speculative", own}
    outputs = {
        method: {(s["task"], s["key"]): s["output"] for s in lines(tmp_path) if s["method"] == method} for method in asked.methods
    }
    assert len(outputs[own]) == 4 and outputs[own] == outputs["speculative"]


def test_directories_of_other_evaluations(copied: EvaluationSettings) -> None:
    with pytest.raises(EvaluationError, match="seed 5 instead of 6"):
        run_evaluation(replace(copied, seed=6), silently)
    (copied.out / "results.json").unlink()
    with pytest.raises(EvaluationError, match=r"no results\.json"):
        run_evaluation(copied, silently)
    with pytest.raises(EvaluationError, match="cannot be made"):
        run_evaluation(replace(copied, out=copied.out / FILE / "below"), silently)


def test_answers_to_other_problems_are_not_mixed_in(settings: EvaluationSettings, tmp_path: Path) -> None:
    def rows(*questions: str) -> str:
        (tmp_path / "test.jsonl").write_text("".join(json.dumps({"question": q, "answer": "#### 5"}) + "\n" for q in questions))
        return str(tmp_path / "test.jsonl")

    asked = replace(settings, suites=("gsm8k",), tasks=None, lengths=None, methods=("full",), budgets=None, out=tmp_path / "out")
    asked = replace(asked, engine={"device": "cpu", "max_model_len": 256})
    first = run_evaluation(replace(asked, data=rows("the red cat", "the old dog")), silently)["rows"]
    assert [row["n"] for row in first] == [2]
    with pytest.raises(EvaluationError, match=r"answers to other problems of gsm8k/gsm8k \(problem 1 is not the same\)"):
        run_evaluation(replace(asked, data=rows("the red cat", "the old fox")), silently)
    again = run_evaluation(replace(asked, data=rows("the red cat", "the old dog")), silently)["rows"]
    assert again == first


def test_methods_that_cannot_work_on_a_model(
    write_family: Callable[..., Path], tmp_path: Path, settings: EvaluationSettings
) -> None:
    headless = replace(settings, model=str(write_family("llama")), out=tmp_path / "out", limit=1, budgets=(64,), lengths=(256,))
    headless = replace(headless, engine={"device": "cpu"})
    with pytest.raises(EvaluationError, match="speculative: no retrieval head is known") as refused:
        run_evaluation(headless, silently)
    assert "--skip-unsupported" in str(refused.value)
    assert not (headless.out / FILE).exists()
    results = run_evaluation(replace(headless, skip_unsupported=True), silently)
    assert {row["method"] for row in results["rows"]} == {"full", "random"}
    assert any(note.get("method") == "speculative" and "skipped" in note["why"] for note in results["meta"]["notes"])
    with pytest.raises(EvaluationError, match="no method is left"):
        run_evaluation(replace(headless, methods=("speculative",), skip_unsupported=True), silently)


def test_nothing_to_run(settings: EvaluationSettings, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nothing can be run: skipped"):
        run_evaluation(replace(settings, out=tmp_path, lengths=(99_999,)), silently)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": "1"}, "its score is '1'"),
        ({"score": float("nan")}, "its score is nan"),
        ({"scores": []}, r"its scores is \[\]"),
        ({"scores": {"score": None}}, "its scores is"),
        ({"length": [256]}, r"its length is \[256\]"),
        ({"length": "256"}, "its length is '256'"),
        ({"budget": "64"}, "its budget is '64'"),
        ({"key": [1]}, r"its key is \[1\]"),
        ({"method": None}, "its method is None"),
        ({"stats": None}, "its stats is None"),
        ({"stats": {"overlap": [1]}}, "its stats is"),
        ({"seconds": "x"}, "its seconds is 'x'"),
        ({"output": None}, "its output is None"),
        ({"output_tokens": None}, "its output_tokens is None"),
        ({"output_tokens": True}, "its output_tokens is True"),
        ({"asked": 5}, "its asked is 5"),
    ],
)
def test_a_sample_that_is_none_is_named_with_its_line(copied: EvaluationSettings, change: dict[str, Any], says: str) -> None:
    found = lines(copied.out)
    found[1] |= change
    (copied.out / FILE).write_text("".join(json.dumps(one) + "\n" for one in found))
    with pytest.raises(EvaluationError, match=rf"line 2 of .*samples\.jsonl is no sample, {says}"):
        SampleFile(copied.out)


@pytest.mark.parametrize("line", ["[]", "5", '"x"', "{", "[" * 100_000])
def test_a_line_that_is_no_object_is_no_sample(line: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(line + "\n")
    with pytest.raises(EvaluationError, match=r"line 1 of .*samples\.jsonl is no sample"):
        SampleFile(tmp_path)


@pytest.mark.parametrize(
    "meta",
    [None, [], {"settings": None}, {"settings": []}, {"suite": None}, {"suite": "ruler"}, {"notes": ["x"]}, {"notes": [{}]}],
)
def test_results_that_a_run_cannot_go_on_with_are_refused(copied: EvaluationSettings, meta: Any) -> None:
    file = copied.out / "results.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"meta": whole["meta"] | meta if isinstance(meta, dict) else meta}))
    with pytest.raises(EvaluationError, match=r"mend it or choose another directory|has results of another evaluation"):
        open_folder(copied)


def test_answers_of_another_number_format_are_not_gone_on_with(copied: EvaluationSettings) -> None:
    with pytest.raises(EvaluationError, match="kv_cache_dtype None instead of int8"):
        run_evaluation(replace(copied, engine=copied.engine | {"kv_cache_dtype": "int8"}), silently)
    assert open_folder(replace(copied, engine=copied.engine | {"kv_cache_dtype": "auto"})) is not None
    whole = json.loads((copied.out / "results.json").read_text())
    (copied.out / "results.json").write_text(json.dumps(whole | {"meta": whole["meta"] | {"dtype": "bfloat16"}}))
    with pytest.raises(EvaluationError, match="dtype bfloat16 instead of float32, as they are on this machine"):
        run_evaluation(copied, silently)


@pytest.mark.parametrize("option", ["tasks", "data", "judge"])
def test_what_a_suite_of_texts_would_not_look_at_is_refused(option: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"tasks": ("x",), "data": "x", "judge": Judge.at("http://127.0.0.1:9", "one")}
    for suite in ("fidelity", "continuation"):
        with pytest.raises(EvaluationError, match=f"nothing would look at {option}: leave it out"):
            EvaluationSettings("nano", (suite,), tmp_path, texts=("a.txt",), **{option: given[option]})
    with pytest.raises(EvaluationError, match="no task was named"):
        EvaluationSettings("nano", ("ruler",), tmp_path, tasks=())


def test_answers_of_another_head_of_the_same_name_are_not_gone_on_with(tmp_path: Path) -> None:
    folder = shutil.copytree(NANO / "retrieval_head", tmp_path / "head")
    asked = EvaluationSettings(
        "nano",
        ("ruler",),
        tmp_path / "out",
        budgets=(32,),
        lengths=(128,),
        limit=1,
        tasks=("niah_single",),
        retrieval_head=str(folder),
        engine={"device": "cpu", "max_model_len": 128},
    )
    run_evaluation(asked, silently)
    assert run_evaluation(replace(asked, limit=2), silently)["meta"]["heads"].keys() == {str(folder)}
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=r"has results of another retrieval head .*is another one now.*: choose another"):
        run_evaluation(replace(asked, limit=3), silently)
