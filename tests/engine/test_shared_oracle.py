"""The shared oracle: the best sets that several layers could read together, beside Hugging Face's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specontext import LLM, SamplingParams
from specontext.errors import ConfigError

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
BUDGET, SINK, RECENT = 14, 2, 4


def best(weights: torch.Tensor, length: int) -> torch.Tensor:
    """What a KV head reads whose best tokens have these weights [S]: bool [S]."""
    kept = torch.zeros(len(weights), dtype=torch.bool)
    kept[:SINK] = kept[length - RECENT : length] = True
    kept[SINK + weights[SINK : length - RECENT].topk(BUDGET - SINK - RECENT).indices] = True
    return kept


@pytest.mark.parametrize(("method", "bands"), [("shared-oracle", [0, 0, 0]), ("shared-oracle-bands2", [0, 1, 1])])
def test_against_masked_attention(
    method: str,
    bands: list[int],
    make_llm: MakeLLM,
    prompts: list[list[int]],
    reference: Callable[[str], PreTrainedModel],
    masked_forward: Callable[..., Any],
) -> None:
    """Token by token: its dense attention on what was decoded sparsely gives its sets, and these its logits."""
    llm = make_llm("llama", "shared-oracle", budget=BUDGET, methods=("shared-oracle", "shared-oracle-bands2"))
    model, ids, decoded = reference("llama"), prompts[2], 5
    start, logits = len(ids) - decoded, []
    engine = llm.engine
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=decoded + 1, method=method)
    forced = [*ids[start:], 5]
    generation = engine.add_request("one", ids[:start], params, forced=forced, on_logits=lambda row: logits.append(row.clone()))
    while not generation.finished:
        engine.step()
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    masks = [torch.ones(len(ids), len(ids), dtype=torch.bool).tril().repeat(heads, 1, 1) for _ in bands]
    for position in range(start, len(ids)):
        seen = masked_forward(model, ids, masks, attentions=True).attentions
        maxima = torch.stack([layer[0, :, position].unflatten(0, (groups, -1)).amax(1) for layer in seen])  # [L, Hkv, S]
        for layer, band in enumerate(bands):
            mean = maxima[torch.tensor(bands) == band].mean(0)
            for head in range(heads):
                masks[layer][head, position] = best(mean[head * groups // heads], position + 1)
    expected = masked_forward(model, ids, masks).logits[0, start - 1 :]
    torch.testing.assert_close(torch.stack(logits), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("offload_layers", [0, 2])
def test_its_reading_is_counted_like_that_of_others(
    offload_layers: int, make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]
) -> None:
    methods = ("full", "oracle", "shared-oracle", "shared-oracle-bands3")
    llm = make_llm("llama", "shared-oracle", budget=BUDGET, methods=methods, offload_layers=offload_layers, verify_loads=True)
    outputs = llm.generate([prompts[2]] * 4, [greedy(8, method=method) for method in methods])
    stats = {method: output.stats for method, output in zip(methods, outputs, strict=True)}
    for method in ("shared-oracle", "shared-oracle-bands3"):
        assert stats[method]["tokens_read_per_step"] == BUDGET and stats[method]["decode_steps"] == 7
        assert stats[method]["selection_bytes_per_step"] == stats[method]["bytes_full_per_step"]
        assert stats[method]["selection_s_per_step"] > 0
        streamed = stats["full"]["bytes_loaded_per_step"]
        assert (stats[method]["bytes_loaded_per_step"] > streamed) == (offload_layers > 0)
    llm.engine.check_integrity()


def test_it_covers_less_than_the_oracle_and_more_than_chance(make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]) -> None:
    methods = ("oracle", "shared-oracle-bands3", "shared-oracle", "random")
    llm = make_llm("llama", "shared-oracle", budget=BUDGET, methods=("shared-oracle", "full", *methods), measure_recall=True)
    outputs = llm.generate([prompts[2]] * 4, [greedy(2, method=method) for method in methods])  # one step: the same state
    first = [output.stats["attention_recall_by_layer"][0] for output in outputs]  # where all have the same query
    assert first == sorted(first, reverse=True) and first[0] == pytest.approx(first[1], abs=0.01)
    recalls = [output.stats["attention_recall"] for output in outputs]
    assert recalls == sorted(recalls, reverse=True)


def test_a_model_with_fewer_layers_than_bands(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match="needs 5 layers and the model has 3"):
        make_llm("llama", "shared-oracle", budget=BUDGET, methods=("shared-oracle", "shared-oracle-bands5"))


def test_what_others_ask_for_beside_it_is_theirs(make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]) -> None:
    """Log-probabilities of prompts that are computed in steps in which the dense pass runs, too."""
    llm = make_llm("llama", "speculative", budget=BUDGET, methods=("shared-oracle", "full"), max_num_batched_tokens=9)
    asked = [greedy(30, method="shared-oracle"), greedy(4, prompt_logprobs=0)]
    together = llm.generate([prompts[1], prompts[2]], asked)
    alone = [llm.generate([prompt], one)[0] for prompt, one in zip(prompts[1:3], asked, strict=True)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    for found, expected in zip(together[1].prompt_logprobs or [], alone[1].prompt_logprobs or [], strict=True):
        assert (found is None) == (expected is None)
        assert found is None or found == pytest.approx(expected, abs=1e-5)


def test_without_others_in_its_engine_it_chooses_alike_wherever_layers_are(
    make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]
) -> None:
    """The dense pass reads the row of its own token on the host, which then must be there within the step."""
    found = []
    for offload_layers in (0, -1):
        llm = make_llm("llama", "shared-oracle", budget=BUDGET, methods=("shared-oracle",), offload_layers=offload_layers)
        found.append([output.token_ids for output in llm.generate(prompts, greedy(20))])
    assert found[0] == found[1]
