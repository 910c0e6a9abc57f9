"""A token that the tokenizer has and the model has not is named by every verb that reads text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from specontext.locations import NANO

SMALL = ("--length", 128, "--tokens-per-step", 128, "--queries", 8, "--steps", 2, "--objective", "attention")
NAMED = "('<|new|>') is in the tokenizer and not in the model"
Fails = Callable[..., str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" the sun = 100. <|new|> the moon = 200." * 40)
    return file


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_generate(fails: Fails, larger_tokenizer: Path, chat: list[str]) -> None:
    words = ["generate", larger_tokenizer, "--prompt", "the sun <|new|>", "--max-tokens", 2, "--device", "cpu", *chat]
    assert NAMED in fails(words)


def test_eval_of_a_text(fails: Fails, larger_tokenizer: Path, text: Path, tmp_path: Path) -> None:
    words = ["eval", larger_tokenizer, "--suite", "fidelity", "--text", text, "--lengths", 100, "--limit", 1, "--compare", 4]
    assert NAMED in fails([*words, "--methods", "streaming", "--max-model-len", 256, "-o", tmp_path / "out"])


def test_eval_of_prompts(fails: Fails, larger_tokenizer: Path, tmp_path: Path) -> None:
    """The token opens every prompt."""
    shutil.copytree(larger_tokenizer, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    opened = TemplateProcessing(single="<|new|> $A", special_tokens=[("<|new|>", 1839)])
    tokenizer.backend_tokenizer.post_processor = opened
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["eval", tmp_path / "model", "--suite", "ruler", "--lengths", 256, "--limit", 2, "--budgets", 64]
    assert NAMED in fails([*words, "--methods", "streaming", "-o", tmp_path / "out"])


@pytest.mark.parametrize("verb", ["analyze", "calibrate"])
def test_heads(fails: Fails, larger_tokenizer: Path, text: Path, tmp_path: Path, verb: str) -> None:
    head = NANO / "retrieval_head"
    words = ["head", verb, head, "--target", larger_tokenizer, "--text", text, "-o", tmp_path / "out", "--length", 128]
    assert f"{text}: token 1839 {NAMED}" in fails([*words, "--queries", 8] if verb == "analyze" else words)


def test_distill_on_text(fails: Fails, larger_tokenizer: Path, text: Path, tmp_path: Path) -> None:
    message = fails(["distill", larger_tokenizer, "-o", tmp_path / "head", "--data", text, *SMALL])
    assert f"{text}: token 1839 {NAMED}" in message
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "the sun <|new|>"}, NAMED),
        ({"prompt": "the sun <|new|>", "completion": "the moon"}, NAMED),
        ({"input_ids": [5, 1839, 6]}, "'input_ids' of line 1 of"),
        ({"input_ids": [5, 10**30, 6]}, "is not a token id of this model: its vocabulary is 0 .. 1838"),
        ({"messages": [{"role": "user", "content": "<|new|>"}, {"role": "assistant", "content": "the sun"}]}, NAMED),
    ],
)
@pytest.mark.parametrize("on_policy", [0, 1])
def test_distill_on_rows(
    fails: Fails, larger_tokenizer: Path, tmp_path: Path, row: dict[str, object], says: str, on_policy: int
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in [row, {"text": "the sun = 100. the moon = 200."}]))
    words = ["distill", larger_tokenizer, "-o", tmp_path / "head", "--data", file, "--on-policy", on_policy, *SMALL]
    message = fails(words)
    assert f"line 1 of {file}" in message and says in message


def test_a_pad_token_that_the_model_does_not_know_pads_nothing(run: Callable[..., object], tmp_path: Path) -> None:
    """A common way to make a tokenizer larger than its model; padding is never looked at, so any token will do."""
    shutil.copytree(NANO, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id == 1839
    tokenizer.save_pretrained(tmp_path / "model")
    ran = run("distill", tmp_path / "model", "-o", tmp_path / "head", "--data", "tasks:retrieval", *SMALL)
    assert ran.status == 0, ran.stderr  # type: ignore[attr-defined]
