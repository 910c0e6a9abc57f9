"""Full attention through the engine gives the logits of the unmodified Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.core import Batch

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def record_logits(llm: LLM) -> tuple[dict[tuple[str, int], Tensor], list[int]]:
    """Logits of every (request, position) that the engine computes from now on, and the tokens of every step."""
    found: dict[tuple[str, int], Tensor] = {}
    sizes: list[int] = []
    states: list[Tensor] = []
    model, run = llm.engine.loaded.model, llm.engine.runner.run
    model.get_decoder().register_forward_hook(lambda _, args, output: states.append(output.last_hidden_state[0]))

    def recording(batch: Batch) -> Tensor:
        returned = run(batch)
        logits = model.lm_head(states.pop())
        assert (returned - logits[batch.last_tokens]).abs().max() < 1e-4
        names = {request.seat: request.request_id for request in llm.engine.scheduler.running}
        for row, (seat, position) in enumerate(zip(batch.seats.tolist(), batch.positions.tolist(), strict=True)):
            assert (names[seat], position) not in found, "a token was computed twice"
            found[names[seat], position] = logits[row]
        sizes.append(len(logits))
        return returned

    llm.engine.runner.run = recording  # type: ignore[method-assign]
    return found, sizes


def check_logits(llm: LLM, model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams) -> list[int]:
    found, sizes = record_logits(llm)
    for output in llm.generate(prompts, params):
        ids = output.prompt_token_ids + output.token_ids[:-1]
        expected = model(torch.tensor([ids])).logits[0]
        engine = torch.stack([found.pop((output.request_id, position)) for position in range(len(ids))])
        assert (engine - expected).abs().max() < 1e-4
        assert expected.abs().max() > 1, "the check says nothing about logits near zero"
    assert not found
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("offload_layers", [0, 1, -1])
def test_all_positions_through_chunked_prefill_and_decode(
    family: str,
    offload_layers: int,
    make_llm: Callable[..., LLM],
    reference: Callable[[str], PreTrainedModel],
    prompts: list[list[int]],
    greedy: Callable[..., SamplingParams],
) -> None:
    llm = make_llm(family, "full", offload_layers=offload_layers, max_num_batched_tokens=23)
    sizes = check_logits(llm, reference(family), prompts, greedy(9))
    assert max(sizes) == 23, "prompts were to be cut at the step's limit"


def test_a_context_of_many_tiles(
    make_llm: Callable[..., LLM],
    reference: Callable[[str], PreTrainedModel],
    prompts: list[list[int]],
    greedy: Callable[..., SamplingParams],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specontext.engine.decode.TILE", 16)
    for offload_layers in (0, -1):
        llm = make_llm("llama", "full", offload_layers=offload_layers, max_num_batched_tokens=50)
        check_logits(llm, reference("llama"), prompts, greedy(9))


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rope(
    rope: str, write_family: Callable[..., Path], prompts: list[list[int]], greedy: Callable[..., SamplingParams]
) -> None:
    folder = write_family("llama", rope_parameters={"rope_theta": 10000.0} | ROPES[rope])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    llm = LLM(folder, config=SpeContextConfig(method="full"), device="cpu", max_num_batched_tokens=31)
    check_logits(llm, model, prompts, greedy(4))


def test_tied_embeddings(
    write_family: Callable[..., Path], prompts: list[list[int]], greedy: Callable[..., SamplingParams]
) -> None:
    folder = write_family("qwen2", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    check_logits(LLM(folder, config=SpeContextConfig(method="full"), device="cpu"), model, prompts, greedy(4))
