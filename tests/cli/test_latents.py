"""The verbs for heads, plans and texts with a model whose attention is to latents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from specontext.retrieval.checkpoint import read_config
from tests.cli.conftest import Run

SMALL = ("--length", 256, "--tokens-per-step", 512, "--queries", 16, "--measure-every", 1000)


@pytest.fixture
def latents(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("latents")


def test_text_with_latents_on_the_host(run: Run, latents: Path) -> None:
    words = ("--prompt", "lamp = 4. " * 12, "--max-tokens", 6, "--budget", 32, "--offload-layers", -1, "--json")
    ran = run("generate", latents, *words)
    assert ran.status == 0, ran.stderr
    assert ran.json["stats"]["tokens_read_per_step"] == 32 and ran.json["stats"]["bytes_loaded_per_step"] > 0
    codes = run("generate", latents, *words, "--kv-cache-dtype", "int8")
    assert codes.status == 0, codes.stderr
    assert codes.json["stats"]["bytes_full_per_step"] * 40 * 4 == ran.json["stats"]["bytes_full_per_step"] * 44


def test_a_plan_counts_latents(run: Run, latents: Path) -> None:
    ran = run("plan", latents, "--gpu-memory", "1GiB", "--budget", 64, "--json")
    assert ran.status == 0, ran.stderr
    assert ran.json["inputs"]["kv_bytes_per_token"] == 4 * 4 * 40
    preset = run("plan", "deepseek-v2-lite", "--gpu-memory", "80GiB")
    assert preset.status == 0 and "27 layers, latents of 512 + 64 numbers, bfloat16; 30.4 KiB of KV a token" in preset.stdout
    codes = run("plan", "deepseek-v2-lite", "--gpu-memory", "80GiB", "--kv-cache-dtype", "fp8")
    assert codes.status == 0 and "bfloat16; 15.3 KiB of KV a token, fp8 with scales" in codes.stdout


@pytest.mark.slow
@pytest.mark.parametrize("bands", [1, 2])
def test_a_head_is_trained_for_one_kv_head(bands: int, run: Run, latents: Path, tmp_path: Path) -> None:
    out, loop = tmp_path / "head", ("--loop-steps", 1, "--bands", bands, "--measure-every", 2)
    ran = run("distill", latents, "-o", out, "--data", "tasks", "--steps", 2, "--json", *SMALL, *loop)
    assert ran.status == 0, ran.stderr
    config = read_config(out)
    assert (config.kv_heads, config.key_count, config.head_dim) == (bands, 1, 40)
    served = run("generate", latents, "--retrieval-head", out, "--prompt", "lamp = 4.", "--max-tokens", 3, "--json")
    assert served.status == 0, served.stderr


@pytest.mark.slow
def test_a_whole_draft_is_trained_pruned_and_calibrated(run: Run, latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    options = ("--objective", "both", "--unroll-steps", 1, "--draft-vocabulary", 300, "--feature-layers", "1,2,3")
    ran = run("distill", latents, "-o", out, "--data", "tasks", "--steps", 1, *options, *SMALL)
    assert ran.status == 0, ran.stderr
    pruned = run("head", "prune", out / "draft", "--target", latents, "-o", tmp_path / "pruned")
    assert pruned.status == 0, pruned.stderr
    words = ("--target", latents, "--text", "tasks", "--length", 128, "--sequences", 1)
    ran = run("head", "calibrate", tmp_path / "pruned", "-o", tmp_path / "mapped", *words)
    assert ran.status == 0, ran.stderr
    out = tmp_path / "analysis"
    words = ("--target", latents, "--text", "tasks", "-o", out, "--length", 128, "--sequences", 1, "--queries", 8)
    ran = run("head", "analyze", tmp_path / "mapped", *words, "--budgets", "32", "--lengths", "none", "--drift-tokens", 4)
    assert ran.status == 0, ran.stderr
    assert json.loads((out / "analysis.json").read_text())["budgets"] == [32]
