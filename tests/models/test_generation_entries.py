"""What a checkpoint says of sampling reaches requests, however its weights are loaded, or is refused or named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext.errors import ModelError
from specontext.locations import NANO
from specontext.models.generation_entries import generation_entries, not_followed, recommended_sampling
from specontext.models.loading import load_model


def write(folder: Path, generation: dict[str, Any] | None, **config: Any) -> Path:
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("retrieval_head"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}),
        ({"temperature": 0.0}, {}, {"temperature": 0.0}),  # greedy, as in vLLM
        ({"top_k": 50.0, "max_new_tokens": 4}, {}, {"top_k": 50, "max_tokens": 4}),
        ({"do_sample": True, "max_length": 20}, {}, {}),
        (None, {"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"top_p": 0.5}, {"repetition_penalty": 1.1}, {"top_p": 0.5}),
    ],
)
def test_what_requests_take_from_it(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], wanted: dict[str, Any]
) -> None:
    source = write(tmp_path / "model", generation, **config)
    assert recommended_sampling(generation_entries(source), source) == wanted


@pytest.mark.parametrize("ways", [{}, {"load_format": "dummy"}, {"quantization": "fp8"}])
def test_it_is_the_same_however_weights_are_loaded(tmp_path: Path, ways: dict[str, str]) -> None:
    source = write(tmp_path / "model", {"temperature": 0.6, "eos_token_id": 1})
    loaded = load_model(source, dtype="bfloat16", device=torch.device("cpu"), **ways)  # type: ignore[arg-type]
    assert recommended_sampling(loaded.generation, source) == {"temperature": 0.6}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "warm"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
        ("max_new_tokens", 2.5),
    ],
)
def test_values_that_no_request_may_have_are_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    source = write(tmp_path / "model", {name: value})
    with pytest.raises(ModelError, match=rf"generation_config\.json.*{name} must be.*mend or remove"):
        recommended_sampling(generation_entries(source), source)


def test_a_file_that_the_library_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "model", {"max_new_tokens": -1})
    with pytest.raises(ModelError, match=r"generation_config\.json.*max_new_tokens.*mend it"):
        generation_entries(source)


def test_what_is_not_followed_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "model", {"suppress_tokens": [5, 6], "bad_words_ids": [[4]], "num_beams": 4, "min_new_tokens": 3})
    named = not_followed(generation_entries(source))
    assert sorted(named) == ["bad_words_ids [[4]]", "min_new_tokens 3", "num_beams 4", "suppress_tokens [5, 6]"]
    quiet = write(tmp_path / "quiet", {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": []})
    assert not_followed(generation_entries(quiet)) == []
