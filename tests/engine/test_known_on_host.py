"""A second question on a prompt whose KV is on the host finds all of it: with memory that is pinned no faster than it is waited
for, and in a tier that has room for the request and what is known beside KV, and for no more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams
from specontext.engine.generation import Generation
from specontext.kv import blocks, host_memory, pool
from specontext.kv.host_memory import HostMemory
from tests.engine.test_prefix import BLOCK, HOST_PAGE, LAYERS, SIZE, ask, cached, check_idle, fresh, text
from tests.kv.test_host_memory import Driver, driver

__all__ = ["driver", "fresh"]  # fixtures

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
DOCUMENT, QUESTION = 12 * SIZE, 10


@pytest.fixture
def pinned(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host tier is pinned a page or so at a time, as a GPU's is, and what nobody waits for has to wait."""
    monkeypatch.setattr(host_memory, "CHUNK", 1 << 14)
    monkeypatch.setattr(host_memory, "AHEAD", 1)
    monkeypatch.setattr(host_memory, "PAUSE", 1e9)

    made: list[HostMemory] = []

    def memory(num_bytes: int, *, pinned: bool, directory: Any, near: torch.device) -> HostMemory:
        made.append(HostMemory(num_bytes, pinned=True))
        return made[-1]

    monkeypatch.setattr(pool, "HostMemory", memory)
    yield
    for one in made:
        one.close()


def second_question(llm: LLM, document: list[int], greedy: Greedy) -> Generation:
    return ask(llm, document + text(99, QUESTION), greedy(4))


@pytest.mark.parametrize("seats", [1, 2])
def test_a_prompt_is_known_though_no_memory_is_pinned_ahead(
    seats: int, pinned: None, make_llm: MakeLLM, greedy: Greedy, fresh: Any
) -> None:
    """The engine of the benchmark: short prompts in turn, then long ones, of which the last is asked about once more."""
    llm = make_llm(budget=12, offload_layers=-1, max_num_seqs=seats, max_model_len=DOCUMENT + 64, max_num_batched_tokens=50)
    for seed, length in enumerate((3 * SIZE, 3 * SIZE, DOCUMENT)):
        document = text(seed, length)
        ask(llm, document, greedy(1))
    again = second_question(llm, document, greedy)
    assert cached(again) == DOCUMENT
    assert again.request.output_token_ids == fresh(document + text(99, QUESTION), greedy(4))
    assert again.request.output_token_ids == second_question(llm, document, greedy).request.output_token_ids
    check_idle(llm)


def test_memory_is_expected_for_a_prompt_and_for_what_is_kept_of_it(
    pinned: None, make_llm: MakeLLM, greedy: Greedy, fresh: Any
) -> None:
    """Where blocks are copies: with as much pinned as was asked for when a prompt began, its pages do not push out its blocks."""
    llm = make_llm(budget=12, offload_layers=1, max_num_seqs=2, max_model_len=DOCUMENT + 64, max_num_batched_tokens=50)
    document, memory = text(5, DOCUMENT), llm.engine.parts.kv.host.memory
    llm.engine.add_request("first", document, greedy(1))
    llm.engine.scheduler.admission.admit()
    assert memory is not None
    memory.finish()
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.check_integrity()
    assert cached(second_question(llm, document, greedy)) == DOCUMENT


def tier(tokens: int, known: int) -> int:
    """Bytes of a host tier with pages of so many tokens, and what a block has beside KV of `known` tokens."""
    return (1 + -(-tokens // SIZE) + (BLOCK - 1) * (known // SIZE)) * HOST_PAGE


@pytest.mark.parametrize("seats", [1, 3])
def test_a_request_and_what_is_kept_of_it_just_fit(seats: int, make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    memory = tier(DOCUMENT + QUESTION + 4, DOCUMENT)
    llm = make_llm(budget=12, offload_layers=-1, host_memory=memory, max_num_seqs=seats, max_num_batched_tokens=50)
    document = text(1, DOCUMENT)
    ask(llm, document, greedy(1))
    again = second_question(llm, document, greedy)
    assert cached(again) == DOCUMENT
    assert again.request.output_token_ids == fresh(document + text(99, QUESTION), greedy(4))
    other = ask(llm, text(2, DOCUMENT), greedy(30))  # needs pages that are kept
    assert other.request.output_token_ids == fresh(text(2, DOCUMENT), greedy(30))
    check_idle(llm)


def test_no_row_of_a_known_prompt_is_copied_on_the_host(
    make_llm: MakeLLM, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []
    copy = blocks.copy_pages
    monkeypatch.setattr(blocks, "copy_pages", lambda *args, **options: (copies.append(args[3]), copy(*args, **options)))
    for offload_layers, copied in ((-1, False), (2, True)):
        llm = make_llm(budget=12, offload_layers=offload_layers)
        ask(llm, text(1, DOCUMENT), greedy(1))
        assert cached(second_question(llm, text(1, DOCUMENT), greedy)) == DOCUMENT
        assert bool(copies) == copied


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_any_requests_that_share_pages(
    seed: int, pinned: None, make_llm: MakeLLM, greedy: Greedy, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come and go, wait with what they share, and are aborted, while the tier is too small for all of them."""
    rng = random.Random(seed)
    method = rng.choice(("speculative", "full", "streaming"))
    llm = make_llm(
        "llama",
        method,
        budget=12,
        offload_layers=-1,
        host_memory=tier(rng.choice([150, 200, 300]), rng.choice([0, 100, 300])),
        max_num_seqs=rng.choice([2, 4]),
        max_num_batched_tokens=rng.choice([20, 60]),
        methods=[],
        verify_loads=True,
    )
    engine, kv = llm.engine, llm.engine.parts.kv
    assert len(kv.offloaded) == LAYERS
    texts = [text(seed, 90) for seed in range(2)]
    asked = [
        (rng.choice(texts)[: rng.randint(20, 90)] + text(rng.randrange(5), rng.randint(1, 20)), greedy(rng.randint(1, 24)))
        for _ in range(14)
    ]
    jobs: list[Generation] = []
    shared = parked = 0
    for at in range(3000):
        if len(jobs) < len(asked) and (rng.random() < 0.35 or not engine.has_work):
            jobs.append(engine.add_request(f"r{at}", *asked[len(jobs)]))
        elif not engine.has_work:
            break
        elif rng.random() < 0.02:
            engine.abort(rng.choice(jobs).request.request_id)
        elif rng.random() < 0.05 and len(engine.scheduler.running) > 1:
            engine.catch_up()
            engine.scheduler.admission.preempt(but=None)
        elif rng.random() < 0.02:
            engine.reset_prefix_cache()
        else:
            engine.step()
        engine.check_integrity()
        shared += any(block.users > 1 for block in kv.blocks.tree._order)
        parked += any(one.lent for one in kv.parked)
    check_idle(llm)
    assert (shared or parked) and len(jobs) == len(asked)
    for job, (prompt, params) in zip(jobs, asked, strict=True):
        request, made = job.request, job.request.output_token_ids
        assert request.finish_reason == "abort" or len(made) == params.max_tokens
        if request.prefill_length == request.prompt_length or method == "full":
            assert made == fresh(prompt, params, method)[: len(made)]
