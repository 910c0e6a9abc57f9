"""Validation on a user's machine: all parts with the bundled model, and what the summary says of made-up numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specontext import LLM
from specontext.distill.data import DataError
from specontext.errors import HeadError, SpeContextError
from specontext.evaluation.run import Advance
from specontext.evaluation.samples import EvaluationError
from specontext.evaluation.validation.run import ValidationSettings, validate
from specontext.evaluation.validation.summary import summary
from specontext.evaluation.validation.systems import FULL, OFFLOADED, RESIDENT, parting
from tests.forked import COMMANDS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "validate_real_model"
SYSTEMS = [FULL, RESIDENT, OFFLOADED]


def silently(phase: str, parts: int) -> Advance:
    return lambda done: None


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ValidationSettings:
    return ValidationSettings(
        "nano",
        tmp_path_factory.mktemp("validation") / "out",
        methods=("speculative",),
        budgets=(64, 500),
        lengths=(192, 99_999),
        windows=2,
        problems=1,
        compared=8,
        chain_length=200,
        chain_tokens=64,
        steps=8,
        device="cpu",
        command="scripts/validate_real_model nano",
    )


@pytest.fixture(scope="module")
def text(settings: ValidationSettings) -> str:
    return validate(settings, silently).read_text()


@pytest.fixture(scope="module")
def content(settings: ValidationSettings, text: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((settings.out / "validation.json").read_text())
    return made


def test_every_part_is_there(text: str, content: dict[str, Any], settings: ValidationSettings) -> None:
    for said in ("# SpeContext on nano", "Fidelity on tasks", "RULER, 4 tasks", "A long chain of thought", "tokens/s", "float32"):
        assert said in text
    assert content["failures"] == {} and content["lengths"] == [192]
    assert "**Left out: lengths of 99,999 tokens.** The model's contexts end at 16,640." in text
    held = "skipped: a budget of 500 holds all of 192 tokens, which is what full reads"
    assert f"**fidelity and ruler, 192 tokens, budget 500:** {held}" in text
    rows = json.loads((settings.out / "results.json").read_text())["rows"]
    assert {row["suite"] for row in rows} == {"fidelity", "ruler"}
    assert (settings.out / "report.html").exists()


def test_systems_are_measured_as_they_are(content: dict[str, Any]) -> None:
    systems = {system["name"]: system for system in content["systems"]}
    assert list(systems) == SYSTEMS and all(system["failure"] is None for system in systems.values())
    full, resident, offloaded = (systems[name] for name in SYSTEMS)
    # In float32 it makes no difference where KV lives.
    assert resident["chain"]["token_ids"] == offloaded["chain"]["token_ids"]
    assert full["budget"] is None and resident["budget"] == 64
    assert full["chain"]["finish_reason"] == "stop" and full["chain"]["scores"]["score"] == 1
    for system in systems.values():
        (speed,) = system["speeds"]
        assert speed["step_s"] > 0 and speed["steps"] == 8 and 150 < speed["context"] < 184
        assert speed["tokens_read"] == pytest.approx(64 if system["budget"] else speed["context"] + 4.5)
    assert resident["speeds"][0]["bytes_loaded"] == 0 < offloaded["speeds"][0]["bytes_loaded"]
    assert offloaded["device_kv_bytes"] < resident["device_kv_bytes"]


@pytest.mark.slow
def test_a_part_that_breaks_is_named_and_the_others_run(
    settings: ValidationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise SpeContextError("this breaks")

    monkeypatch.setattr("specontext.evaluation.validation.run.run_fidelity", broken)
    monkeypatch.setattr("specontext.evaluation.validation.run.run_evaluation", broken)
    monkeypatch.setattr(LLM, "__init__", broken)
    said = validate(replace(settings, out=tmp_path / "out"), silently).read_text()
    assert "**Not run: fidelity.** this breaks" in said and "**Not run: ruler.** this breaks" in said
    assert all(f"**{name} could not go on:** this breaks" in said for name in SYSTEMS)


def test_what_cannot_be_validated(settings: ValidationSettings, text: str, tmp_path: Path) -> None:
    asked = replace(settings, out=tmp_path / "out")
    with pytest.raises(EvaluationError, match="end at 16640 tokens"):
        validate(replace(asked, lengths=(99_999,)), silently)
    with pytest.raises(DataError, match="no file or directory"):
        validate(replace(asked, texts=("/no/such/text",)), silently)
    with pytest.raises(EvaluationError, match="unknown method 'chess'"):
        validate(replace(asked, methods=("chess",)), silently)
    with pytest.raises(HeadError, match="no retrieval head in"):
        validate(replace(asked, retrieval_head=str(tmp_path)), silently)
    with pytest.raises(EvaluationError, match="results of another evaluation"):
        validate(replace(settings, seed=1), silently)
    for wrong in ({"lengths": ()}, {"steps": 0}, {"windows": 0}, {"lengths": (10,)}):
        with pytest.raises(EvaluationError):
            replace(settings, **wrong)


@pytest.mark.parametrize(
    ("one", "other", "place"), [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2), ((1,), (), 0)]
)
def test_parting(one: tuple[int, ...], other: tuple[int, ...], place: int | None) -> None:
    assert parting(one, other) == place


def test_the_summary_says_what_the_numbers_say(content: dict[str, Any]) -> None:
    full, resident = map(dict, content["systems"][:2])
    chain = resident["chain"] | {"token_ids": [*full["chain"]["token_ids"][:5], -1], "scores": {"score": 0.0, "steps": 0.25}}
    slow = full["speeds"][0] | {"step_s": 0.2, "context": 1000}
    full |= {"speeds": [slow], "failure": "no room"}
    resident |= {"chain": chain, "speeds": [slow | {"step_s": 0.05}]}
    said = summary(content | {"systems": [full, resident]}, {"rows": [], "pairs": []})
    assert f"6 tokens, full attention {len(full['chain']['token_ids'])}; the first 5 are the same" in said
    assert "Answer: wrong (25.0\u00a0% of its steps right)" in said
    assert "50.0 ms a token (20.0 tokens/s), full attention 200.0 ms: 4.00 times as fast" in said
    assert "**full could not go on:** no room" in said
    assert "Fidelity" not in said and "RULER" not in said


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["nano", "--retrieval-head", "auto", "--quick", "--device", "cpu", "-o", str(out)]
    words += ["--methods", "speculative", "--lengths", "512", "--problems", "1", "--chain-tokens", "32", "--steps", "4"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert (out / "summary.md").read_text() in ran.stdout and "times as fast" in ran.stdout
    failed = COMMANDS.run([sys.executable, f"{SCRIPT}.py", "./nowhere", "-o", str(out)], capture_output=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error:") and "Traceback" not in failed.stderr
