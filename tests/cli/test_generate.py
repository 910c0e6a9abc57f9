"""`specontext generate` against a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specontext.cli.generate import summary

KEYS = ["text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "stats"]
STATS = {
    "method",
    "budget",
    "tokens_read_per_step",
    "selection_bytes_per_step",
    "bytes_loaded_per_step",
    "bytes_full_per_step",
    "overlap",
    "hit_rate",
    "attention_recall",
    "ttft_s",
    "tpot_s",
}
TEXT = " the sun = 100. the moon = 200." * 8


def test_json(run: Any, tiny: Path, tokenizer: Any) -> None:
    ran = run(
        "generate", tiny, "--prompt", TEXT, "--budget", 40, "--offload-layers", -1, "--max-tokens", 5, "--ignore-eos", "--json"
    )
    assert ran.status == 0, ran.stderr
    made = ran.json
    assert list(made) == KEYS
    assert made["prompt_tokens"] == len(tokenizer(TEXT)["input_ids"])
    assert made["completion_tokens"] == len(made["token_ids"]) == 5
    assert made["finish_reason"] == "length"
    stats = made["stats"]
    assert set(stats) >= STATS
    assert stats["method"] == "speculative" and stats["budget"] == 40
    assert stats["tokens_read_per_step"] == 40
    assert 0 < stats["bytes_loaded_per_step"] < stats["bytes_full_per_step"]
    assert stats["attention_recall"] is None


def test_streamed_text_is_the_whole_text(run: Any, tiny: Path) -> None:
    words = ["generate", tiny, "--prompt", TEXT, "--budget", 40, "--max-tokens", 12, "--ignore-eos"]
    streamed, whole = run(*words), run(*words, "--json")
    assert streamed.stdout.removesuffix("\n") == whole.json["text"].removesuffix("\n")
    assert "non-default options: budget=40" in streamed.stderr.splitlines()
    assert "speculative, budget 40" in streamed.stderr


def test_no_options_are_listed_when_none_differ(run: Any, tiny: Path) -> None:
    assert "non-default" not in run("generate", tiny, "--prompt", "the sun", "--max-tokens", 2).stderr


def test_prompt_sources_agree(run: Any, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    given = ["generate", tiny, "--method", "full", "--max-tokens", 4, "--json"]
    expected = run(*given, "--prompt", TEXT).json
    for mark, ending in (("", ""), ("", "\n"), ("", "\r\n"), ("\ufeff", "")):
        file.write_bytes((mark + TEXT + ending).encode())
        for ran in (run(*given, "--prompt-file", file), run(*given, "-", stdin=file.read_bytes())):
            assert ran.json["token_ids"] == expected["token_ids"]
            assert ran.json["prompt_tokens"] == expected["prompt_tokens"]
    file.write_bytes((TEXT + "\n\n").encode())
    assert run(*given, "--prompt-file", file).json["prompt_tokens"] == expected["prompt_tokens"] + 1


def test_sampling_depends_on_the_seed_alone(run: Any, tiny: Path) -> None:
    given = [
        "generate",
        tiny,
        "--prompt",
        TEXT,
        "--method",
        "full",
        "--temperature",
        2,
        "--max-tokens",
        12,
        "--ignore-eos",
        "--json",
    ]
    first, again, other = (run(*given, "--seed", seed).json["token_ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_recall_is_measured_when_asked(run: Any, tiny: Path) -> None:
    ran = run("generate", tiny, "--prompt", TEXT, "--budget", 40, "--max-tokens", 3, "--ignore-eos", "--measure-recall", "--json")
    assert 0 < ran.json["stats"]["attention_recall"] <= 1


def test_chat_template(run: Any, tiny: Path, tokenizer: Any) -> None:
    ran = run("generate", tiny, "--prompt", TEXT, "--method", "full", "--max-tokens", 2, "--chat", "--json")
    assert ran.json["prompt_tokens"] == len(tokenizer(TEXT)["input_ids"]) + 2


def test_other_methods_run_without_a_head(run: Any, tiny: Path) -> None:
    for method in ("full", "streaming", "oracle", "random"):
        ran = run(
            "generate", tiny, "--prompt", TEXT, "--retrieval-head", "none", "--method", method, "--budget", 40, "--max-tokens", 3
        )
        assert ran.status == 0, ran.stderr


@pytest.mark.parametrize("missing", ["overlap", "tpot_s", "bytes_loaded_per_step", "tokens_read_per_step"])
def test_summary_leaves_out_what_is_undefined(missing: str) -> None:
    stats: dict[str, Any] = {
        "method": "speculative",
        "budget": 64,
        "prompt_tokens": 4000,
        "completion_tokens": 1,
        "tokens_read_per_step": 64.0,
        "bytes_loaded_per_step": 2048.0,
        "selection_bytes_per_step": 1024.0,
        "bytes_full_per_step": 2.0**20,
        "overlap": 0.5,
        "hit_rate": 0.75,
        "attention_recall": None,
        "ttft_s": 1.0,
        "tpot_s": 0.01,
    }
    assert "4,000 + 1 tokens" in summary(stats) and "loaded 2.0 KiB" in summary(stats)
    shorter = summary(stats | {missing: None})
    assert "None" not in shorter and len(shorter) < len(summary(stats))
