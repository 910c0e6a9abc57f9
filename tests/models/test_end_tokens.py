"""End tokens are those that Hugging Face's `generate` ends at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext.errors import ModelError
from specontext.locations import NANO
from specontext.models.loading import load_model

CPU = torch.device("cpu")


def write(folder: Path, generation: dict[str, Any] | str | None, **config: Any) -> Path:
    """nano, with these end tokens in its files; its tokenizer's is 1."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("retrieval_head"))
    values = json.loads((folder / "config.json").read_text())
    del values["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(values | config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (folder / "generation_config.json").write_text(text)
    return folder


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 5}, {7, 8}),
        ({"eos_token_id": 7}, {}, {7}),  # not LlamaConfig's default, which nobody wrote
        (None, {"eos_token_id": 5}, {5}),
        (None, {"eos_token_id": [5, 6]}, {5, 6}),
        (None, {}, {1}),
        ({"temperature": 0.5}, {}, {1}),
    ],
)
def test_end_tokens(
    load_format: str, generation: dict[str, Any] | None, config: dict[str, Any], ends: set[int], tmp_path: Path
) -> None:
    loaded = load_model(write(tmp_path / "model", generation, **config), dtype="auto", device=CPU, load_format=load_format)
    assert loaded.end_token_ids == ends
    if load_format == "auto" and ends != {1}:
        theirs = loaded.model.generation_config.eos_token_id
        assert set(theirs if isinstance(theirs, list) else [theirs]) == ends


@pytest.mark.parametrize(
    ("generation", "why"),
    [
        ("{", r"generation_config\.json is broken or truncated.*download it again"),
        ({"eos_token_id": "x"}, "eos_token_id of .* token ids, got 'x'"),
    ],
)
def test_what_cannot_be_read_is_refused(generation: dict[str, Any] | str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        load_model(write(tmp_path / "model", generation), dtype="auto", device=CPU, load_format="dummy")
