"""Random arrivals at a tiny size: every system at every rate, with the same requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig

from specontext.locations import OWN_HEAD
from specontext.model_shape import ModelShape
from specontext.models.tokenizer_files import load_tokenizer
from specontext.retrieval.checkpoint import load_head
from tests import forked


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("arrivals")


@pytest.mark.slow
def test_report(script: ModuleType, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["serving"], "subprocess", forked.COMMANDS)
    sizes = ["--num-prompts", "3", "--num-warmups", "1", "--input-len", "80", "--output-len", "4"]
    script.main([*sizes, "--rates", "20,inf", "--budget", "64", "--device", "cpu", "--max-model-len", "256"])
    *table, line = capfd.readouterr().out.splitlines()
    report = json.loads(line)
    assert table and report["engine"] == ["--budget", "64", "--device", "cpu", "--max-model-len", "256"]
    assert [(row["system"], row["rate"]) for row in report["rows"]] == [
        (system, rate) for system in ("full", "speculative") for rate in (20.0, float("inf"))
    ]
    assert all(row["completed"] == 3 and row["total_output_tokens"] == 12 for row in report["rows"])
    assert all(row["duration"] > 0 and row["median_ttft_ms"] > 0 and row["p99_tpot_ms"] > 0 for row in report["rows"])


def test_a_shape_is_served_without_weights_but_with_a_tokenizer_and_a_head(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_preset = script.config_of
    monkeypatch.setattr(script, "config_of", lambda name: of_preset(name, vocab_size=300, num_hidden_layers=4))
    with script.served("llama-3.2-1b") as (folder, options):
        shape = ModelShape.from_config(AutoConfig.from_pretrained(folder), torch.bfloat16)
        assert shape.vocab_size == 300 and shape.depth == 4 and options[:2] == ["--load-format", "dummy"]
        assert len(load_tokenizer(folder)) == 300
        assert load_head(Path(folder, OWN_HEAD), target=shape).config.target_hidden_size == 2048
    assert not Path(folder).exists()
    with script.served("nano") as served:
        assert served == ("nano", [])
