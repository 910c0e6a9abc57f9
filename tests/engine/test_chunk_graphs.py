"""Short chunks that run in captured pieces give the tokens of chunks that are launched as a whole.

On a CPU the pieces are run and not captured; `test_cuda.py` has captured ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from specontext import LLM, SamplingParams
from specontext.engine.chunk_graphs import LEAST, chunk_sizes, piece_bytes
from specontext.kernels.gpu_chunk import QUERIES
from tests.engine.conftest import ChunksAsIfCaptured

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Change = Callable[[LLM], Any]


def pieces_of(llm: LLM) -> ChunksAsIfCaptured:
    found = llm.engine.runner._chunks
    assert isinstance(found, ChunksAsIfCaptured)
    return found


@pytest.mark.parametrize("offload_layers", [0, 2, -1])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "bands", "windows", "sinks", "shared"])
def test_tokens_are_those_of_whole_passes(
    kind: str, offload_layers: int, make_llm: MakeLLM, prompts: Any, greedy: Greedy, as_if_captured: Change
) -> None:
    plain, cut = (make_llm(kind, budget=24, offload_layers=offload_layers) for _ in range(2))
    as_if_captured(cut)
    expected = [output.token_ids for output in plain.generate(prompts, greedy(8))]
    assert [output.token_ids for output in cut.generate(prompts, greedy(8))] == expected
    assert pieces_of(cut).replayed
    cut.engine.check_integrity()


def test_padding_is_not_what_an_earlier_chunk_has_left(
    make_llm: MakeLLM, prompts: Any, greedy: Greedy, as_if_captured: Change
) -> None:
    plain, cut = (make_llm("llama", budget=24, enable_prefix_caching=False) for _ in range(2))
    as_if_captured(cut)
    longest, shortest = max(prompts, key=len), min(prompts, key=len)
    for prompt in (longest, shortest, longest):
        assert cut.generate(prompt, greedy(6))[0].token_ids == plain.generate(prompt, greedy(6))[0].token_ids
    pieces = pieces_of(cut)
    assert all(place[: pieces.replayed[-1]].isfinite().all() for place in pieces._places.made)


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_a_method_that_watches_prompts_sees_whole_passes(
    method: str, make_llm: MakeLLM, prompts: Any, greedy: Greedy, as_if_captured: Change
) -> None:
    plain, cut = (make_llm("llama", method, budget=24) for _ in range(2))
    as_if_captured(cut)
    expected = [output.token_ids for output in plain.generate(prompts, greedy(8))]
    assert [output.token_ids for output in cut.generate(prompts, greedy(8))] == expected
    assert not pieces_of(cut).replayed


def test_log_probabilities_of_prompts_come_from_whole_passes(make_llm: MakeLLM, prompts: Any, as_if_captured: Change) -> None:
    plain, cut = (make_llm("llama", budget=24) for _ in range(2))
    as_if_captured(cut)
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, ignore_eos=True)
    found, expected = (llm.generate(prompts[0], params)[0].prompt_logprobs for llm in (cut, plain))
    assert found == expected and not pieces_of(cut).replayed


@pytest.mark.parametrize("most", [1, 24, LEAST, 300, 1024, 2047, 2048, 8192])
def test_sizes_take_all_chunks_that_are_short(most: int) -> None:
    sizes = chunk_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == LEAST and sizes[-1] <= QUERIES
    assert sizes[-1] >= min(most, QUERIES - 1) and all(size < most for size in sizes[:-1])
    wasted = [(after - before) / after for before, after in pairwise(sizes) if before >= 512]
    assert all(share <= 0.2 for share in wasted), "at most a fifth is padding where computing takes long"


def test_bytes_grow_with_the_largest_size() -> None:
    few, many = (piece_bytes(most, layers=32, runtime=4 << 30, step_tokens=8192) for most in (256, 4096))
    assert (1 << 30) <= many <= 2 << 30 and few < many / 4
