"""A checkpoint that comes with code of its own: every verb that reads a model runs it where that is allowed, and names the option
where it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run

CODE = """from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
SMALL = ("--length", 256, "--sequences", 1, "--text", "tasks")
VERBS = {
    "plan": ("plan", "MODEL", "--gpu-memory", "1GiB", "--budget", 64),
    "plan of rounded weights": ("plan", "MODEL", "--gpu-memory", "1GiB", "--budget", 64, "--quantization", "int4"),
    "prune": ("head", "prune", "HEAD", "--target", "MODEL", "-o", "OUT"),
    "calibrate": ("head", "calibrate", "HEAD", "--target", "MODEL", "-o", "OUT", *SMALL),
    "analyze": (
        *("head", "analyze", "HEAD", "--target", "MODEL", "-o", "OUT", *SMALL, "--budgets", 64, "--queries", 4),
        *("--lengths", "none", "--calibration-sequences", 0, "--drift-tokens", 0),
    ),
    "distill": (
        *("distill", "MODEL", "-o", "OUT", "--data", "tasks", "--steps", 1, "--length", 256, "--tokens-per-step", 512),
        *("--queries", 16, "--replay-queries", 8),
    ),
    "tasks": ("tasks", "sample", "--task", "program", "--length", 300, "--model", "MODEL"),
}


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A Llama under a type that the library does not know."""
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    (folder / "own.py").write_text(CODE)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_code_of_a_checkpoint_runs_where_it_is_allowed(verb: str, run: Run, own: Path, tmp_path: Path) -> None:
    places = {"MODEL": own, "HEAD": own / "retrieval_head", "OUT": tmp_path / "out"}
    words = [places.get(word, word) if isinstance(word, str) else word for word in VERBS[verb]]
    if verb != "tasks":  # whose tokenizer is the library's
        refused = run(*words)
        assert refused.status == 1 and "--trust-remote-code" in refused.stderr.splitlines()[-1], refused.stderr
        assert not (tmp_path / "out").exists()
    allowed = run(*words, "--trust-remote-code")
    assert allowed.status == 0, allowed.stderr
