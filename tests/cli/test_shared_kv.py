"""Models whose last layers read the KV of earlier ones, as users have them: generate, plan, a head that is made and mapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run

TEXT = " the sun = 100. the moon = 200." * 8
SMALL = ("--length", 128, "--tokens-per-step", 256, "--queries", 8, "--measure-every", 1000)


def test_generate_with_layers_on_the_host(run: Run, checkpoint: Callable[[str], Path]) -> None:
    words = ("generate", checkpoint("shared"), "--prompt", TEXT, "--offload-layers", -1, "--max-tokens", 5, "--ignore-eos")
    ran, whole = run(*words, "--json", "--budget", 40), run(*words, "--json", "--method", "full")
    assert ran.status == whole.status == 0, ran.stderr
    stats = ran.json["stats"]
    assert stats["tokens_read_per_step"] == 40 and stats["offload_layers"] == 3
    assert 0 < stats["bytes_loaded_per_step"] < stats["bytes_full_per_step"]
    assert run(*words, "--json", "--budget", 400).json["token_ids"] == whole.json["token_ids"]


def test_plan_counts_owners_once(run: Run, checkpoint: Callable[[str], Path]) -> None:
    words = ("plan", checkpoint("shared"), "--budget", 64, "--gpu-memory", "1GiB", "--host-memory", "1GiB")
    shown, plan = run(*words), run(*words, "--json").json
    assert shown.status == 0 and "3 layers (2 more with a window, 3 more without KV of their own)" in shown.stdout
    inputs = plan["inputs"]
    assert (inputs["layers"], inputs["layers_with_window"], inputs["layers_without_kv_of_their_own"]) == (3, 2, 3)
    assert inputs["kv_bytes_per_token"] == 3 * 2 * 32 * 2 * 4


@pytest.mark.slow
def test_a_head_is_made_mapped_and_looked_at(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    target, out = checkpoint("shared"), tmp_path / "head"
    loop = ("--loop-steps", 1, "--bands", 2, "--on-policy", 0.5, "--recommended-budget", 40)
    ran = run("distill", target, "-o", out, "--data", "tasks", "--steps", 1, *loop, *SMALL)
    assert ran.status == 0, ran.stderr
    ran = run("head", "calibrate", out, "--target", target, "--text", "tasks", "--length", 128, "-o", tmp_path / "mapped")
    assert ran.status == 0 and "layer 2" in ran.stdout and "layer 3" not in ran.stdout
    served = run("generate", target, "--retrieval-head", tmp_path / "mapped", "--prompt", TEXT, "--max-tokens", 3, "--json")
    assert served.status == 0 and served.json["stats"]["tokens_read_per_step"] == 40


@pytest.mark.slow
def test_drafts_are_pruned_and_heads_analyzed(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    target, out = checkpoint("shared"), tmp_path / "head"
    ran = run("distill", target, "-o", out, "--data", "tasks", "--steps", 1, "--objective", "both", *SMALL)
    assert ran.status == 0, ran.stderr
    ran = run("head", "prune", out / "draft", "--target", target, "-o", tmp_path / "pruned")
    assert ran.status == 0, ran.stderr
    words = ("--text", "tasks", "--length", 128, "--sequences", 2, "--lengths", "none", "--drift-tokens", 4, "--budgets", "32")
    ran = run("head", "analyze", out, "--target", target, "-o", tmp_path / "analysis", *words)
    assert ran.status == 0, ran.stderr
