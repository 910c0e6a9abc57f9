"""`specontext distill` and `specontext head calibrate` on tiny models: heads that load, resume, maps, clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specontext.retrieval.checkpoint import read_config
from tests.cli.conftest import Run

SHORT = ("--length", 256, "--tokens-per-step", 512, "--measure-every", 1000)
SMALL = (*SHORT, "--queries", 16)


def test_a_distilled_head_serves_its_target(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    ran = run("distill", tiny, "-o", out, "--data", "tasks", "--steps", 3, "--recommended-budget", 64, "--json", *SMALL)
    assert ran.status == 0, ran.stderr
    assert ran.json["steps"] == 3
    config = read_config(out)
    assert (config.trained_length, config.recommended_budget) == (256, 64)
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    assert json.loads((out / "training.json").read_text())["config"]["objective"] == "attention"
    served = run("generate", tiny, "--retrieval-head", out, "--prompt", "lamp = 4.", "--max-tokens", 3, "--json")
    assert served.status == 0 and served.json["stats"]["budget"] == 64


def test_a_head_that_could_not_be_measured_is_said_to_be_the_last_one(run: Run, tiny: Path, tmp_path: Path) -> None:
    ran = run("distill", tiny, "-o", tmp_path / "head", "--data", "tasks", "--steps", 1, *SMALL, "--length", 96)
    assert ran.status == 0, ran.stderr
    assert "the last one, since sequences of 96 tokens of the held-out text are too short to tell heads apart" in ran.stdout


def test_bands_and_a_phase_with_the_selection_in_the_loop(run: Run, tiny: Path, tmp_path: Path) -> None:
    """Trained on two sources, stopped at the end and asked again: nothing is left to do."""
    out, loop = tmp_path / "head", ("--loop-steps", 2, "--bands", 3, "--measure-every", 2, "--save-dtype", "bfloat16")
    data = ("--data", "tasks:retrieval=3", "--data", "tasks:program")
    ran = run("distill", tiny, "-o", out, *data, "--steps", 2, "--json", *SMALL, *loop)
    assert ran.status == 0, ran.stderr
    assert ran.json["steps"] == 4 and ran.json["held_out"]["kept_step"] in (2, 4)
    assert {"kl_divergence", "kl_256_32", "kl_shared_oracle_256_32", "agreement_256_32"} <= set(ran.json["held_out"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert ["selection" in row for row in log] == [False, False, True, True] and all("effect" in row for row in log)
    config = read_config(out)
    assert (config.kv_heads, config.key_heads, config.key_inputs, config.head_dim) == (6, 1, "around", 48)
    assert config.head_map == ((0, 3), (1, 4), (2, 5))
    stored = load_file(out / "model.safetensors")
    assert all((tensor.dtype == torch.bfloat16) == (tensor.dim() > 1) for tensor in stored.values())
    served = run("generate", tiny, "--retrieval-head", out, "--prompt", "lamp = 4.", "--max-tokens", 3, "--budget", 32, "--json")
    assert served.status == 0, served.stderr
    again = run("distill", tiny, "-o", out, *data, "--steps", 2, *SMALL, *loop, "--resume")
    assert again.status == 0 and "with the lowest held-out KL divergence" in again.stdout


def test_output_distillation_writes_a_whole_draft_that_prunes_to_the_head(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    options = ("--objective", "both", "--unroll-steps", 2, "--draft-vocabulary", 300, "--feature-layers", "1,2,3")
    ran = run("distill", tiny, "-o", out, "--data", "tasks", "--steps", 2, *options, *SMALL)
    assert ran.status == 0, ran.stderr
    assert json.loads((out / "draft" / "config.json").read_text())["draft_vocab_size"] == 300
    pruned = run("head", "prune", out / "draft", "--target", tiny, "-o", tmp_path / "pruned")
    assert pruned.status == 0, pruned.stderr
    info = run("head", "info", tmp_path / "pruned", "--json").json
    own = run("head", "info", out, "--json").json
    assert info["parameters"] == own["parameters"] and info["pruned_share"] > 0 and own["pruned_share"] is None


def test_a_draft_that_could_not_be_written_is_refused_before_it_is_trained(
    fails: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    words = ("distill", tiny, "-o", tmp_path / "head", "--data", "tasks", "--objective", "output", "--steps", 2, *SHORT)
    assert "has a head_map" in fails((*words, "--bands", 2, "--feature-layers", "1,2,3"))
    assert "feature layers [1, 3]" in fails((*words, "--feature-layers", "1,3"))
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize("command", ["distill", "calibrate"])
def test_where_no_head_can_be_written_is_known_before_one_is_made(
    command: str, fails: Callable[..., str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    for where in ("models.loading", "distill.session"):
        monkeypatch.setattr(f"specontext.{where}.load_model", lambda *_, **__: pytest.fail("loaded"))
    words = ("distill", tiny, "--data", "tasks", "--steps", 2, *SMALL)
    if command == "calibrate":
        words = ("head", "calibrate", tiny / "retrieval_head", "--target", tiny, "--text", "tasks")
    assert f"{tmp_path / 'file'} is a file; name a directory" in fails((*words, "-o", tmp_path / "file" / "head"))
    assert "holds a model that is not a retrieval head" in fails((*words, "-o", tiny))
    assert "name another one" in fails((*words, "-o", tmp_path / ("long" * 100)))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_started_training_needs_resume_and_nothing_else_may_change(
    run: Run, fails: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "head"
    words = ("distill", tiny, "-o", out, "--data", "tasks", "--steps", 2, *SMALL)
    assert "no training to resume" in fails((*words, "--resume"))
    assert run(*words).status == 0
    assert "add --resume" in fails(words)
    assert run(*words, "--resume").status == 0
    changed = ("distill", tiny, "-o", out, "--data", "tasks", "--steps", 3, *SMALL, "--resume")
    assert "other settings (steps)" in fails(changed, status=1)
    settings = (out / "training.json").read_bytes()
    for other, says in (
        (("--data", "tasks:program"), "data ['tasks'] instead of ['tasks', 'tasks:program']"),
        (("--start", tiny / "retrieval_head"), "start None instead of"),
        (("--on-policy", 0.5), "on_policy 0.0 instead of 0.5"),
        (("--heads", 8), "shape {"),
        (("--dtype", "bfloat16"), "dtype 'auto' instead of 'bfloat16'"),
    ):
        said = fails((*words, *other, "--resume"))
        assert "holds a training with other settings" in said and says in said
        assert (out / "training.json").read_bytes() == settings
    assert run(*words, "--resume", "--save-dtype", "float16", "--device", "cpu").status == 0, "which change nothing"
    (out / "training.json").write_text("{")
    assert "training.json is broken" in fails((*words, "--resume"))


def test_options_that_nothing_would_look_at_are_refused(fails: Callable[..., str], tiny: Path, tmp_path: Path) -> None:
    words = ("distill", tiny, "-o", tmp_path / "head", "--data", "tasks", "--steps", 1, *SHORT)
    for given, says in (
        (("--start", tiny / "retrieval_head", "--bands", 2), "--bands has no effect with --start"),
        (("--start", tiny / "retrieval_head", "--variant", "features"), "--variant has no effect with --start"),
        (("--start", tiny / "retrieval_head", "--rope-theta", 10000), "--rope-theta has no effect with --start"),
        (("--variant", "embedding", "--feature-layers", "1"), "--feature-layers has no effect with --variant embedding"),
        (("--draft-vocabulary", 5), "--draft-vocabulary has no effect without --objective output or both"),
        (("--unroll-steps", 3), "--unroll-steps has no effect without --objective output or both"),
        (("--objective", "output", "--effect-weight", 2), "--effect-weight has no effect with --objective output"),
        (("--output-weight", 2), "--output-weight has no effect without --objective both"),
        (("--temperature", 1), "--temperature has no effect without --on-policy"),
        (("--loop-learning-rate", 1), "--loop-learning-rate has no effect without --loop-steps"),
    ):
        assert says in fails((*words, *given))


def test_what_ends_a_training_is_known_before_it_begins(
    fails: Callable[..., str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.distill.session.load_model", lambda *_, **__: pytest.fail("loaded"))
    words = ("distill", tiny, "-o", tmp_path / "head", "--data", "tasks", "--steps", 1, *SHORT)
    assert "temperature must" in fails((*words, "--on-policy", 0.5, "--temperature", -1))
    assert "recommended_budget 20 has no room beside sinks and recent tokens: 21" in fails((*words, "--recommended-budget", 20))
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "draft").write_text("mine")
    assert "it is a file" in fails((*words, "--objective", "both"))
    (tmp_path / "head" / "draft").unlink()
    (tmp_path / "head" / "draft").mkdir()
    (tmp_path / "head" / "draft" / "config.json").write_text("{}")
    assert "holds something else than a draft" in fails((*words, "--objective", "both"))


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds_that_not_all_random_numbers_take_are_refused(
    seed: int, fails: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    given, says = ("-o", tmp_path / "out", "--seed", seed), "seed must be from 0 to 4294967295"
    assert says in fails(("distill", tiny, "--data", "tasks", *given))
    assert says in fails(("head", "calibrate", tiny, "--target", tiny, "--text", "tasks", *given))
    assert says in fails(("head", "analyze", tiny, "--target", tiny, "--text", "tasks", *given))
    assert says in fails(("eval", tiny, "--suite", "ruler", *given))


def test_on_policy_sequences_leave_the_engine_and_the_teacher_apart(run: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("distill", tiny, "--data", "tasks:retrieval", "--steps", 4, *SMALL, "--length", 128, "--on-policy", 0.5)
    first, second = (run(*words, "-o", tmp_path / name) for name in ("a", "b"))
    assert first.status == second.status == 0, first.stderr
    logs = [
        [json.loads(line)["attention"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("a", "b")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--objective", "logits"), "choose one of attention, output, both"),
        (("--data", "no/such/file"), "there is no file or directory no/such/file"),
        (("--length", 100000), "exceeds the model's maximum"),
        (("--variant", "embedding", "--objective", "output"), "choose --variant features"),
        (("--feature-layers", "a,b"), "whole numbers with commas"),
        (("--feature-layers", "1,1,2"), "not distinct"),
        (("--on-policy", 1.5), "share from 0 to 1"),
        (("--steps", 0), "steps must be at least 1"),
        (("--teacher-layers", "median"), "unknown teacher_layers 'median'"),
        (("--attention-weight", 0, "--effect-weight", 0), "are both 0"),
        (("--loop-steps", 2, "--objective", "output"), "the loop teaches a head to select"),
        (("--bands", 9), "3 layers do not divide into 9 bands"),
        (("--head-dim", 0), "head_dim of a retrieval head must be a positive integer, got 0"),
        (("--head-dim", 65536, "--heads", 2**20), "too many for this machine"),
        (("--learning-rate", "inf"), "learning_rate must be above 0 and finite"),
        (("--dtype", "int4"), "unknown dtype 'int4': choose one of auto, float32"),
        (("--data", ""), "is empty"),
        (("--heads", 1), "1 query heads are fewer than the 2 groups"),
        (("--key-heads", 5), "do not divide into 5 key heads"),
        (("--key-inputs", "after"), "unknown key_inputs 'after'"),
        (("--variant", "embedding", "--key-inputs", "around"), "reads features"),
        (("--objective", "both", "--key-inputs", "around", "--feature-layers", "1,2,3"), "an EAGLE-3 draft has"),
        (("--data", "tasks=0"), "weight of tasks must be a number above 0"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(
    fails: Callable[..., str], tiny: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    data: tuple[object, ...] = () if "--data" in words else ("--data", "tasks")
    assert message in fails(("distill", tiny, "-o", tmp_path / "head", *data, *words))
    assert not (tmp_path / "head" / "config.json").exists()


def test_calibrate_writes_the_map_into_the_head(run: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("--target", tiny, "--text", "tasks", "--length", 256, "--sequences", 2, "--budget", 48)
    ran = run("head", "calibrate", tiny / "retrieval_head", "-o", tmp_path / "head", "--theta", "10000,1000", "--json", *words)
    assert ran.status == 0, ran.stderr
    report = ran.json
    config = read_config(tmp_path / "head")
    assert [list(row) for row in config.head_map or ()] == report["head_map"] and config.rope_theta == report["rope_theta"]
    assert report["recall"] >= max(report["thetas"].values()) - 1e-9
    again = run("head", "calibrate", tmp_path / "head", *words)
    assert again.status == 0 and "attention recall at 48 of 256 tokens" in again.stdout
    short = run("head", "calibrate", tmp_path / "head", *words[:4], "--length", 128, "--sequences", 1)
    assert short.status == 0 and "attention recall at 40 of 128 tokens" in short.stdout


def test_calibrate_says_what_does_not_fit(fails: Callable[..., str], tiny: Path, tmp_path: Path) -> None:
    head = tiny / "retrieval_head"
    words = ("head", "calibrate", head, "-o", tmp_path / "x", "--target", tiny, "--text", "tasks")
    assert "'auto' or numbers" in fails((*words, "--theta", "warm"))
    assert "exceeds the model's maximum" in fails((*words, "--length", 10**6))
    assert "there is no file" in fails(
        ("head", "calibrate", head, "-o", tmp_path / "x", "--target", tiny, "--text", "nowhere.txt")
    )
    assert "a budget of 40 reads all of 32 tokens" in fails((*words, "--length", 32))
    assert "a budget of 16 has no room beside" in fails((*words, "--length", 128, "--budget", 16))
    assert "--sequences must be at least 1" in fails((*words, "--sequences", 0))
    assert "--length must be at least 2" in fails((*words, "--length", -5))
    assert "unknown dtype 'int4'" in fails((*words, "--dtype", "int4"))
    assert "name of a file or directory is empty" in fails((*words, "--text", ""))
    assert "name of a file or directory is empty" in fails(("head", "calibrate", "", *words[3:]))
    assert "with -o DIR" in fails(("head", "calibrate", "some/draft", "--target", tiny, "--text", "tasks"))
    assert not (tmp_path / "x").exists()
