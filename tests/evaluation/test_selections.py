"""What is recorded of a prompt is what the engine did."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.evaluation.report import write_report
from specontext.evaluation.selections import TOP, UNITS, SelectionError, record_selections, token_texts, write_selections

STEPS = 6
BUDGET = 12  # sink 2, recent 4
LENGTH = 47


@pytest.fixture(scope="module")
def llm(make_llm: Callable[..., LLM]) -> LLM:
    """An engine that lets requests choose methods of all kinds; two of its three layers live in host memory."""
    methods = ("full", "oracle", "streaming", "speculative-union")
    return make_llm("llama", budget=BUDGET, offload_layers=2, measure_recall=True, methods=methods)


@pytest.fixture
def prompt(prompts: list[list[int]]) -> list[int]:
    return prompts[1]


def record(llm: LLM, prompt: list[int], method: str | None = None) -> dict[str, Any]:
    return record_selections(llm, prompt, tokens=STEPS, method=method, ignore_eos=True)


def heads(step: dict[str, Any]) -> list[dict[str, Any]]:
    return [head for layer in step["heads"] for head in layer]


def positions(gaps: list[int]) -> list[int]:
    return [total - 1 for total in itertools.accumulate(gaps)]


def mean_recall(made: dict[str, Any]) -> float:
    shares = [head["recall"] for step in made["steps"] for head in heads(step)]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("method", [None, "oracle", "streaming", "speculative-union", "full"])
def test_the_recorded_recall_is_the_engine_s(llm: LLM, prompt: list[int], method: str | None) -> None:
    made = record(llm, prompt, method)
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 1, ignore_eos=True, method=method)
    [output] = llm.generate([prompt], params)
    assert len(made["steps"]) == output.stats["decode_steps"] == STEPS
    assert mean_recall(made) == pytest.approx(output.stats["attention_recall"], abs=1e-4)
    assert [step["length"] for step in made["steps"]] == list(range(LENGTH + 1, LENGTH + 1 + STEPS))
    assert len(made["texts"]) == LENGTH + STEPS + 1 and made["prompt_tokens"] == LENGTH
    assert made["method"] == (method or "speculative") and made["layers"] == [0, 1, 2]


@pytest.mark.parametrize("method", [None, "oracle", "streaming"])
def test_sets_hold_the_budget_with_sinks_and_recent_tokens(llm: LLM, prompt: list[int], method: str | None) -> None:
    made = record(llm, prompt, method)
    for step in made["steps"]:
        for gaps in step["sets"]:
            read = positions(gaps)
            assert len(read) == BUDGET and read == sorted(set(read))
            assert read[:2] == [0, 1] and read[-4:] == list(range(step["length"] - 4, step["length"]))
        assert {head["set"] for head in heads(step)} == set(range(len(step["sets"])))


def test_who_reads_which_set(llm: LLM, prompt: list[int]) -> None:
    shared, own = record(llm, prompt), record(llm, prompt, "oracle")
    assert shared["readers"] == [[0, 1]] * 3
    for step in shared["steps"]:  # a set for each group, the same in all layers
        assert step["heads"][0][0]["set"] == step["heads"][2][0]["set"] != step["heads"][0][1]["set"]
    assert max(len(step["sets"]) for step in own["steps"]) > 2  # layers choose for themselves


def test_true_attention_is_that_of_hugging_face(llm: LLM, prompt: list[int], reference: Callable[[str], Any]) -> None:
    made, model = record(llm, prompt, "full"), reference("llama")
    params = SamplingParams(temperature=0.0, max_tokens=1, method="full")
    [output] = llm.generate([prompt], params)
    ids = torch.tensor([[*prompt, *output.token_ids]])
    attentions = model(ids, output_attentions=True).attentions
    step = made["steps"][0]
    for layer, expected in enumerate(attentions):
        grouped = expected[0, :, -1].unflatten(0, (2, -1)).mean(1)
        for head in range(2):
            seen = step["heads"][layer][head]
            assert seen["set"] == -1 and seen["recall"] == 1
            order = grouped[head].argsort(descending=True)[: len(seen["top"])]
            assert seen["top"][:3] == order[:3].tolist() and len(seen["top"]) <= TOP
            masses = torch.tensor(seen["mass"]) / UNITS
            assert torch.allclose(masses, grouped[head][torch.tensor(seen["top"])], atol=1e-4)


def test_the_engine_is_left_as_it_was(llm: LLM, prompt: list[int]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    [before] = llm.generate([prompt], params)
    made = record(llm, prompt)
    [after] = llm.generate([prompt], params)
    assert before.token_ids == after.token_ids and llm.engine.runner.observer is None
    assert len(made["steps"]) == STEPS
    with pytest.raises(ValueError, match="empty"):
        record(llm, [])
    assert llm.engine.runner.observer is None


@pytest.mark.parametrize("method", ("speculative", "oracle"))
def test_the_number_that_is_named_is_the_greatest_that_works(
    llm: LLM, prompt: list[int], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.evaluation.selections.MOST_NUMBERS", 3000)
    with pytest.raises(SelectionError, match="record fewer tokens") as refused:
        record_selections(llm, prompt, tokens=300, method=method)
    most = int(str(refused.value).removesuffix(" at most").rpartition(" ")[2])
    made = record_selections(llm, prompt, tokens=most, method=method, ignore_eos=True)
    assert len(made["steps"]) == most > 1 and len(made["layers"]) == 1
    with pytest.raises(SelectionError, match=f" {most} at most"):
        record_selections(llm, prompt, tokens=most + 1, method=method)


def test_what_cannot_be_recorded_is_refused(llm: LLM, prompt: list[int], make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(SelectionError, match="at least one step"):
        record_selections(llm, prompt, tokens=0)
    with pytest.raises(SelectionError, match="would make a record too large to look at: record fewer tokens, "):
        record_selections(llm, prompt, tokens=100_000)
    with pytest.raises(ValueError, match="'quest' is none that this engine runs"):
        record_selections(llm, prompt, method="quest")
    with pytest.raises(SelectionError, match="measure_recall=True"):
        record_selections(make_llm("llama", "full"), prompt)


def test_an_output_that_ends_at_once_has_nothing_to_show(llm: LLM, prompt: list[int]) -> None:
    [output] = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))
    ending = replace(llm.engine.loaded, end_token_ids=frozenset(output.token_ids))
    ended = LLM(ending, config=SpeContextConfig(budget=BUDGET, sink=2, recent=4), measure_recall=True)
    with pytest.raises(SelectionError, match="ended after 1 token"):
        record_selections(ended, prompt, tokens=STEPS)
    assert len(record(ended, prompt)["steps"]) == STEPS


def test_large_models_keep_some_of_their_layers(llm: LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specontext.evaluation.selections.MOST_NUMBERS", 2 * STEPS * 2 * 2 * TOP + STEPS * 2 * (BUDGET + STEPS))
    made = record(llm, prompt)
    assert made["layers"] == [0, 2] and all(len(step["heads"]) == 2 for step in made["steps"])


def test_texts_of_tokens_make_the_text(tokenizer: Any) -> None:
    text = "Naïve café 日本語 – done.\n\tEnd"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts).replace("\ufffd", "") == "<|begin|>" + text


def test_a_record_goes_through_its_file_into_the_report(llm: LLM, prompt: list[int], tmp_path: Path) -> None:
    made = record(llm, prompt)
    file = write_selections(tmp_path / "new" / "folder", made)
    assert json.loads(file.read_text()) == made and [one.name for one in file.parent.iterdir()] == ["selections.json"]
    html, _ = write_report(file.parent)
    assert f"{100 * mean_recall(made):.1f}\u00a0% of the true attention" in html.read_text()
    (tmp_path / "taken").write_text("")
    with pytest.raises(SelectionError, match="cannot be written"):
        write_selections(tmp_path / "taken", made)
