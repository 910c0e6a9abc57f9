"""The method end to end against a plain reference: Hugging Face's eager model with masks, the head's formula, and a sort."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specontext import LLM, SamplingParams
from specontext.core import Selection
from specontext.model_shape import ModelShape
from specontext.retrieval.checkpoint import load_head
from specontext.retrieval.head import RetrievalHead

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "bands")
BUDGET, SINK, RECENT = 14, 2, 4


def record_selections(llm: LLM) -> list[Tensor]:
    """The scored tokens [G, k] of every selection of a lone request from now on."""
    found: list[Tensor] = []
    select = llm.engine.parts.selector.select

    def recording(step: Any) -> Selection:
        selection = select(step)
        found.append(selection.tokens[0].clone())
        return selection

    llm.engine.parts.selector.select = recording  # type: ignore[method-assign]
    return found


def plain_selection(head: RetrievalHead, embeddings: Tensor, inputs: list[Tensor], one_set: bool) -> list[set[int]]:
    """For each group what the last of S tokens may read, from the layers' inputs [S - 1, H] at the tokens before."""
    c, length = head.config, len(embeddings)
    features = None
    if c.variant == "features":
        known = torch.cat([inputs[layer] for layer in c.feature_layers], dim=-1)
        features = torch.cat((known, torch.zeros_like(known[:1])))  # nobody sees the last token's
    queries, keys = head(embeddings, features, torch.arange(length))
    candidates = list(range(SINK, length - RECENT))
    weights = torch.stack(
        [
            torch.softmax(keys[candidates, h * c.key_count // c.heads] @ queries[-1, h] / c.head_dim**0.5, 0)
            for h in range(c.heads)
        ]
    )
    groups = weights.view(c.kv_heads, -1, len(candidates)).amax(1)
    if one_set:
        groups = groups.amax(0, keepdim=True).expand(c.kv_heads, -1)
    always = set(range(SINK)) | set(range(length - RECENT, length))
    chosen = []
    for row in groups.tolist():
        best = sorted(range(len(candidates)), key=lambda i: (row[i], i), reverse=True)[: BUDGET - SINK - RECENT]
        chosen.append(always | {candidates[i] for i in best})
    return chosen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["head", "batch"])
def test_selections_and_tokens_equal_a_plain_reference(
    family: str,
    granularity: str,
    checkpoint: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    make_llm: Callable[..., LLM],
    masked_forward: Callable[..., Any],
    prompts: list[list[int]],
    greedy: Callable[..., SamplingParams],
) -> None:
    model, ids = reference(family), list(prompts[1])
    llm = make_llm(family, budget=BUDGET, granularity=granularity, offload_layers=2, slots=BUDGET + 3, max_num_batched_tokens=13)
    found = record_selections(llm)
    (output,) = llm.generate([ids], greedy(8))

    shape = ModelShape.from_config(model.config, torch.float32)
    head = load_head(checkpoint(family) / "retrieval_head", target=shape)
    groups_of = head.config.head_map or [range(shape.kv_heads)] * shape.layers
    ratio = shape.query_heads // shape.kv_heads
    allowed: dict[int, list[set[int]]] = {}  # decoded position -> what each group's heads see
    for step, token in enumerate(output.token_ids):
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        masks = [causal.expand(shape.query_heads, -1, -1).clone() for _ in range(shape.layers)]
        for position, sets in allowed.items():
            for layer in range(shape.layers):
                for q in range(shape.query_heads):
                    masks[layer][q, position] = False
                    masks[layer][q, position, sorted(sets[groups_of[layer][q // ratio]])] = True
        result = masked_forward(model, ids, masks)
        assert result.logits[0, -1].argmax().item() == token, f"token {step} differs"
        ids.append(token)
        embeddings = model.get_input_embeddings()(torch.tensor(ids))
        chosen = plain_selection(head, embeddings, result.inputs, granularity == "batch")
        allowed[len(ids) - 1] = chosen
        if step < len(found):
            mine = [{t for t in row.tolist() if t >= 0} for row in found[step]]
            assert mine == chosen[: len(mine)]
    assert len(found) == len(output.token_ids) - 1
    assert len(set(map(str, found))) > 3, "the selection never changed"


def head_keys(llm: LLM, length: int) -> Tensor:
    return llm.engine.parts.selector.cache.keys_of(0, length).clone()  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_do_not_depend_on_chunks_or_company(
    family: str, make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., SamplingParams]
) -> None:
    prompt, found = prompts[2], []
    for chunk, company in ((1024, False), (1, False), (7, False), (29, True)):
        llm = make_llm(family, budget=400, max_num_batched_tokens=chunk)
        stream = llm.stream(prompt, greedy(40))
        next(stream)  # the prompt is computed
        if company:
            llm.generate(prompts[:2], greedy(2))
        for _ in range(4):
            next(stream, None)
        found.append(head_keys(llm, len(prompt) + 3))
        stream.close()
    for keys in found[1:]:
        torch.testing.assert_close(keys, found[0], rtol=1e-4, atol=1e-4)
    assert found[0].std() > 0.1


def test_keys_of_a_reused_seat_start_afresh(
    make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., SamplingParams]
) -> None:
    llm = make_llm("llama", budget=12, max_num_seqs=1)
    first = [llm.generate([p], greedy(12))[0].token_ids for p in prompts]
    again = [llm.generate([p], greedy(12))[0].token_ids for p in reversed(prompts)]
    assert first == again[::-1]


def test_saved_state_is_not_touched_by_who_takes_the_seat(
    make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., SamplingParams]
) -> None:
    llm = make_llm("llama", budget=12, max_num_seqs=1)
    selector, stream = llm.engine.parts.selector, llm.stream(prompts[2], greedy(8))
    next(stream)
    keys, feature = selector.save(0, len(prompts[2]))  # type: ignore[misc]
    before = keys.clone(), feature.clone()
    stream.close()  # type: ignore[attr-defined]
    llm.generate([prompts[1]], greedy(8))
    assert torch.equal(keys, before[0]) and torch.equal(feature, before[1])
    selector.open(0, len(prompts[2]))
    selector.restore(0, len(prompts[2]), (keys, feature))
    again = selector.save(0, len(prompts[2]))
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))  # type: ignore[call-overload]
    selector.close(0)


@pytest.mark.parametrize(
    ("family", "granularity"), [("llama", "head"), ("bands", "head"), ("llama", "union"), ("llama", "batch")]
)
def test_contexts_that_fit_the_budget_are_read_whole_and_not_scored(
    family: str, granularity: str, make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., SamplingParams]
) -> None:
    """Alone nothing is scored at all; beside a long context a short one reads, and is counted, the same."""
    llm = make_llm(family, budget=24, granularity=granularity, offload_layers=2)
    found = record_selections(llm)
    short, long = prompts[0], prompts[2]
    alone = llm.generate([short], greedy(8))[0]
    assert [sorted(set(row.flatten().tolist()) - {-1}) for row in found] == [[*range(len(short) + i + 1)] for i in range(7)]
    fitting = [selection.clone() for selection in found]
    found.clear()
    both = llm.generate([short, long], greedy(8))
    for row, other in zip(fitting, found, strict=True):
        assert torch.equal(row, other)
    assert both[0].token_ids == alone.token_ids
    assert both[0].stats["selection_bytes_per_step"] == alone.stats["selection_bytes_per_step"] == 0
    assert both[1].stats["selection_bytes_per_step"] > 0


def test_the_step_in_which_a_context_outgrows_the_budget_begins_to_score(
    make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., SamplingParams], monkeypatch: pytest.MonkeyPatch
) -> None:
    from specontext.retrieval.methods import speculative

    spans: list[int] = []
    scores = speculative.paged_retrieval_scores
    monkeypatch.setattr(
        speculative,
        "paged_retrieval_scores",
        lambda *given: spans.append(given[5]) or scores(*given),  # type: ignore[func-returns-value]
    )
    make_llm("llama", budget=33).generate([prompts[3]], greedy(8))
    assert spans == [34, 35, 36, 37]
