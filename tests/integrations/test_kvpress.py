"""The press: what it masks is what the engine does not read; kvpress's own pipeline needs other versions and is not run here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from specontext import LLM, SpeContextConfig
from specontext.errors import ConfigError, SpeContextError
from specontext.integrations.kvpress import SpeContextPress, main
from specontext.locations import NANO
from specontext.models.checking import cache_name
from specontext.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return list(torch.randint(4, 250, (120,), generator=torch.Generator().manual_seed(0)).tolist())


@pytest.fixture
def model() -> PreTrainedModel:
    return load()


def load(where: str | Path = NANO, **options: Any) -> PreTrainedModel:
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    return made.eval()


def logits_of(model: PreTrainedModel, press: SpeContextPress | None, context: list[int], *parts: list[int]) -> list[Tensor]:
    """Last logits after each part, read as by kvpress's pipeline: the context through the decoder, the rest through the model."""
    cache, place, seen = DynamicCache(config=model.config), len(context), []
    with torch.no_grad():
        if press is None:
            model.model(input_ids=torch.tensor([context]), **{cache_name(model): cache})
        else:
            with press(model):
                model.model(input_ids=torch.tensor([context]), **{cache_name(model): cache})
        for part in parts:
            positions = torch.arange(place, place + len(part))[None]
            out = model(input_ids=torch.tensor([part]), **{cache_name(model): cache}, position_ids=positions, logits_to_keep=1)
            seen.append(out.logits[0, -1])
            place += len(part)
    return seen


def engine_logits(ids: list[int], after: list[int], budget: int, model: str = "nano") -> list[Tensor]:
    llm = LLM(model, config=SpeContextConfig(budget=budget), device="cpu")
    rows: list[Tensor] = []
    made = llm.engine.add_request(
        "0",
        ids,
        SamplingParams(temperature=0, max_tokens=len(after) + 1),
        forced=after,
        on_logits=lambda row: rows.append(row.clone()),
    )
    while not made.finished:
        llm.engine.step()
    return rows[1:]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_token_reads_what_the_engine_lets_it_read(ids: list[int], implementation: str) -> None:
    after, model = ids[100:], load(attn_implementation=implementation)
    found = logits_of(model, SpeContextPress(budget=32), ids[:100], *([token] for token in after))
    expected = engine_logits(ids[:100], after, 32)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=2e-4, rtol=1e-4)
    dense = logits_of(model, None, ids[:100], *([token] for token in after))
    assert (torch.stack(found) - torch.stack(dense)).abs().max() > 0.1  # the budget leaves something out


@pytest.mark.parametrize("family", ["windows", "sinks", "shared", "delta", "latents"])
def test_layers_with_a_window_read_all_of_it_and_the_map_is_of_the_others(
    ids: list[int], checkpoint: Callable[[str], Path], family: str
) -> None:
    folder, after = checkpoint(family), ids[100:]
    model = load(folder, attn_implementation="eager")
    found = logits_of(model, SpeContextPress(budget=32), ids[:100], *([token] for token in after))
    expected = engine_logits(ids[:100], after, 32, str(folder))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=2e-4, rtol=1e-3)
    dense = logits_of(model, None, ids[:100], *([token] for token in after))
    assert (torch.stack(found) - torch.stack(dense)).abs().max() > 0.01


def test_a_question_at_once_is_read_token_by_token(ids: list[int], model: PreTrainedModel) -> None:
    whole = logits_of(model, SpeContextPress(budget=32), ids[:100], ids[100:110], ids[110:111])
    steps = logits_of(model, SpeContextPress(budget=32), ids[:100], *([token] for token in ids[100:111]))
    torch.testing.assert_close(torch.stack(whole), torch.stack(steps[9:]))


def test_the_share_is_of_the_cache_and_nothing_is_left_out_at_0(ids: list[int], model: PreTrainedModel) -> None:
    dense = logits_of(model, None, ids[:100], ids[100:101])
    for press, same in ((SpeContextPress(0.0), True), (SpeContextPress(0.75), False)):
        found = logits_of(model, press, ids[:100], ids[100:101])
        assert torch.allclose(found[0], dense[0], atol=1e-4) is same
    assert SpeContextPress(0.75)._budget(101).total == 26 and SpeContextPress(0.999)._budget(101).total == 21


def test_answers_that_are_cut_off_again_leave_no_trace(ids: list[int], model: PreTrainedModel) -> None:
    cache, context, press = DynamicCache(), torch.tensor([ids[:100]]), SpeContextPress(budget=32)
    with torch.no_grad():
        with press(model):
            model.model(input_ids=context, **{cache_name(model): cache})
        answers = []
        for question in (ids[100:105], ids[110:115], ids[100:105]):
            out = model(
                input_ids=torch.tensor([question]), **{cache_name(model): cache}, position_ids=torch.arange(100, 105)[None]
            )
            answers.append(out.logits[0, -1])
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :100], layer.values[:, :, :100]
    torch.testing.assert_close(answers[0], answers[2])
    assert not torch.allclose(answers[0], answers[1])


def test_it_belongs_to_one_cache_and_comes_off(ids: list[int], model: PreTrainedModel) -> None:
    dense, press = logits_of(model, None, ids[:100], ids[100:101]), SpeContextPress(budget=32)
    logits_of(model, press, ids[:100], ids[100:101])
    assert torch.equal(logits_of(model, None, ids[:100], ids[100:101])[0], dense[0])
    press.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_it_cannot_do(ids: list[int], model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="below 1, got 1"), SpeContextPress(1.0)(model):
        pass
    with (
        pytest.raises(ConfigError, match="'flex_attention' does not do"),
        SpeContextPress()(load(attn_implementation="flex_attention")),
    ):
        pass
    with pytest.raises(ConfigError, match="budget"):
        SpeContextPress(budget=3)
    with pytest.raises(SpeContextError, match="one sequence"), torch.no_grad(), SpeContextPress()(model):
        model.model(input_ids=torch.tensor([ids[:10]] * 2), **{cache_name(model): DynamicCache()})


def test_the_command_is_kvpress_s_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(tmp_path)]) == 2 and "not the directory 'evaluation'" in capsys.readouterr().err
    (tmp_path / "evaluate_registry.py").write_text("PRESS_REGISTRY = {}\n")
    (tmp_path / "evaluate.py").write_text(
        "import sys\nfrom evaluate_registry import PRESS_REGISTRY\nprint(sys.argv[1:], PRESS_REGISTRY['specontext'])\n"
    )
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.delitem(sys.modules, "evaluate_registry", raising=False)
    assert main([str(tmp_path), "--retrieval-head", "mine", "--press_name", "specontext"]) == 0
    said = capsys.readouterr().out
    assert "['--press_name', 'specontext'] SpeContextPress(compression_ratio=0.5, retrieval_head='mine'" in said
    (tmp_path / "evaluate.py").write_text("import a_module_that_is_not_there\n")
    assert main([str(tmp_path)]) == 1 and "a_module_that_is_not_there" in capsys.readouterr().err
