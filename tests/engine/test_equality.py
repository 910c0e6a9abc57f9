"""Tokens do not depend on method, tiers, slots, chunks or company wherever they must not (float32)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.errors import LoadError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "bands")
SPARSE = ("speculative", "streaming", "oracle", "random")
Prompts = list[list[int]]
MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Expected = Callable[..., list[list[int]]]


def tokens_of(llm: LLM, prompts: Prompts, params: SamplingParams) -> list[list[int]]:
    """One batch of all prompts; afterwards the engine must be idle and hold nothing."""
    outputs = [output.token_ids for output in llm.generate(prompts, params)]
    check_idle(llm)
    return outputs


def check_idle(llm: LLM) -> None:
    parts = llm.engine.parts
    assert not llm.engine.has_work
    llm.engine.check_integrity()
    assert parts.kv.arena.pages.num_held == parts.kv.host.pages.num_held == 0
    if parts.method.method == "speculative":
        assert parts.selector.cache.pages.num_held == 0  # type: ignore[attr-defined]


# A budget that covers everything changes nothing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"),
    [*itertools.product(FAMILIES, ("full", "speculative", "oracle")), ("llama", "streaming"), ("llama", "random")],
)
@pytest.mark.parametrize("offload_layers", [0, 2])
def test_a_budget_of_the_whole_context_gives_hugging_face_s_tokens(
    family: str, method: str, offload_layers: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm(family, method, budget=110, offload_layers=offload_layers, verify_loads=True, max_num_batched_tokens=64)
    assert tokens_of(llm, prompts, greedy()) == expected(family)


@pytest.mark.parametrize(
    ("family", "method"), [*(("llama", method) for method in ("full", "speculative", "oracle")), ("bands", "speculative")]
)
@pytest.mark.parametrize("chunk", [1, 23])
def test_chunks_change_nothing(
    family: str, method: str, chunk: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm(family, method, budget=110, offload_layers=2, max_num_batched_tokens=chunk)
    assert tokens_of(llm, prompts, greedy()) == expected(family)


@pytest.mark.parametrize("family", ["qwen3", "bands"])
@pytest.mark.parametrize(("granularity", "page_size"), [("head", 1), ("batch", 7), ("union", 16), ("head", 64)])
def test_pages_and_granularity_change_nothing(
    family: str, granularity: str, page_size: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm(family, budget=110, offload_layers=2, granularity=granularity, page_size=page_size, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == expected(family)


def test_the_default_budget_and_a_limit_on_the_context(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    assert tokens_of(make_llm("llama", offload_layers=-1, max_model_len=107), prompts, greedy()) == expected("llama")


def test_tiles_change_nothing(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.engine.decode.TILE", 16)
    for method in ("full", "oracle"):
        llm = make_llm("qwen3", method, budget=110, offload_layers=2, max_num_batched_tokens=40)
        assert tokens_of(llm, prompts, greedy()) == expected("qwen3")


# Budgets and slots far below the length --------------------------------------------------------------------------------

TIGHT: dict[str, Any] = {"budget": 12, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> Callable[[str, str], list[list[int]]]:
    """Tokens at a tight budget, resident, one prompt at a time, in one chunk."""
    known: dict[tuple[str, str], list[list[int]]] = {}

    def tokens(family: str, method: str) -> list[list[int]]:
        if (family, method) not in known:
            llm = make_llm(family, method, budget=TIGHT["budget"])
            known[family, method] = [llm.generate([prompt], greedy())[0].token_ids for prompt in prompts]
        return known[family, method]

    return tokens


@pytest.mark.parametrize("method", SPARSE)
def test_a_tight_budget_changes_tokens(method: str, alone: Callable[[str, str], list[list[int]]], expected: Expected) -> None:
    """Else the tests below would say nothing."""
    assert alone("llama", method)[1:] != expected("llama")[1:]


@pytest.mark.parametrize(("family", "method"), [*(("llama", method) for method in SPARSE), ("bands", "speculative")])
@pytest.mark.parametrize(("offload_layers", "slots"), [(0, None), (1, None), (1, 17), (-1, 14)])
def test_tiers_and_slots_change_nothing(
    family: str,
    method: str,
    offload_layers: int,
    slots: int | None,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    alone: Callable[[str, str], list[list[int]]],
) -> None:
    llm = make_llm(family, method, **TIGHT, offload_layers=offload_layers, slots=slots, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == alone(family, method)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["speculative", "oracle"])
def test_every_family_with_evictions(
    family: str,
    method: str,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    alone: Callable[[str, str], list[list[int]]],
) -> None:
    llm = make_llm(family, method, **TIGHT, offload_layers=2, slots=14, max_num_seqs=3, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == alone(family, method)


@pytest.mark.parametrize(("family", "method"), [*(("llama", method) for method in SPARSE), ("bands", "speculative")])
@pytest.mark.parametrize(("seats", "chunk"), [(1, 1024), (2, 9)])
def test_requests_that_join_and_leave_change_nothing(
    family: str,
    method: str,
    seats: int,
    chunk: int,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    alone: Callable[[str, str], list[list[int]]],
) -> None:
    llm = make_llm(family, method, budget=12, offload_layers=2, slots=15, max_num_seqs=seats, max_num_batched_tokens=chunk)
    lengths = [24, 3, 11, 20]  # some leave early, and others take their seats
    outputs = llm.generate(prompts, [greedy(n) for n in lengths])
    assert [o.token_ids for o in outputs] == [t[:n] for t, n in zip(alone(family, method), lengths, strict=True)]
    assert [o.finish_reason for o in outputs] == ["length"] * 4
    check_idle(llm)


def test_requests_added_while_others_decode(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Callable[[str, str], list[list[int]]]
) -> None:
    llm = make_llm("llama", budget=12, offload_layers=2, max_num_batched_tokens=20)
    engine, generations = llm.engine, []
    for i, prompt in enumerate(prompts):
        generations.append(engine.add_request(f"late-{i}", prompt, greedy()))
        for _ in range(5):
            engine.step()
    while engine.has_work:
        engine.step()
    assert [g.request.output_token_ids for g in generations] == alone("llama", "speculative")
    check_idle(llm)


def test_little_memory_makes_requests_wait_and_changes_nothing(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Callable[[str, str], list[list[int]]]
) -> None:
    roomy = make_llm("llama", budget=12, offload_layers=1, max_model_len=112)
    together = max_running(roomy)
    assert tokens_of(roomy, prompts, greedy()) == alone("llama", "speculative") and max(together) == 4
    page = 16 * roomy.shape.row_bytes * roomy.shape.kv_heads * roomy.shape.layers  # of the host, with the rows of all layers
    host = 10 * page  # 9 pages and the null page: 7 for the longest request
    tight = make_llm("llama", budget=12, offload_layers=1, max_model_len=112, host_memory=host)
    together = max_running(tight)
    assert tokens_of(tight, prompts, greedy()) == alone("llama", "speculative")
    assert max(together) < 4


def max_running(llm: LLM) -> list[int]:
    """How many requests run, step by step, from now on."""
    counts: list[int] = []
    run = llm.engine.runner.run

    def counting(batch: Any) -> torch.Tensor:
        counts.append(len(llm.engine.scheduler.running))
        return run(batch)

    llm.engine.runner.run = counting  # type: ignore[method-assign]
    return counts


@pytest.mark.parametrize("method", SPARSE)
def test_slots_are_really_evicted(method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", method, budget=12, offload_layers=2, slots=14, verify_loads=True)
    hot = llm.engine.parts.kv.hot
    assert hot is not None
    run, evicted = llm.engine.runner.run, []

    def counting(batch: Any) -> torch.Tensor:
        before = hot.token_of_slot.clone()
        logits = run(batch)
        evicted.append(((before >= 0) & (hot.token_of_slot != before)).sum().item())
        return logits

    llm.engine.runner.run = counting  # type: ignore[method-assign]
    (output,) = llm.generate([prompts[2]], greedy())
    hit_rate, loaded = output.stats["hit_rate"], output.stats["bytes_loaded_per_step"]
    assert sum(evicted) > 10 and isinstance(hit_rate, float) and isinstance(loaded, float)
    assert 0 < hit_rate < 1 and loaded > 0


def test_a_wrong_load_is_noticed_by_the_engine(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.kv.transfers.copy_pieces", lambda *_, **__: None)
    llm = make_llm("llama", budget=12, offload_layers=2, verify_loads=True)
    with pytest.raises(LoadError):
        llm.generate(prompts, greedy())
    check_idle(llm)


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "speculative", "random"])
def test_sampled_tokens_do_not_depend_on_the_batch(method: str, make_llm: MakeLLM, prompts: Prompts) -> None:
    params = [SamplingParams(temperature=1.0, seed=s, max_tokens=16, ignore_eos=True) for s in range(4)]
    llm = make_llm("llama", method, budget=14)
    one_by_one = [llm.generate([p], [q])[0].token_ids for p, q in zip(prompts, params, strict=True)]
    for options in ({}, {"max_num_seqs": 2, "offload_layers": 2}, {"max_num_batched_tokens": 7}):
        outputs = make_llm("llama", method, budget=14, **options).generate(prompts, params)
        assert [o.token_ids for o in outputs] == one_by_one
    again = [llm.generate([p], [q])[0].token_ids for p, q in zip(prompts, params[1:] + params[:1], strict=True)]
    assert all(a != b for a, b in zip(again, one_by_one, strict=True)), "seeds change nothing"


def test_outputs_of_one_prompt_differ_when_sampled_and_agree_when_greedy(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm("llama", budget=110, max_num_seqs=2)
    (output,) = llm.generate([prompts[1]], greedy(n=3))
    assert [o.token_ids for o in output.outputs] == [expected("llama")[1]] * 3
    params = SamplingParams(temperature=1.0, n=3, seed=7, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate([prompts[1]], params)
    assert len({tuple(o.token_ids) for o in output.outputs}) == 3
    assert llm.generate([prompts[0], prompts[1]], params)[1].outputs[2].token_ids == output.outputs[2].token_ids
    check_idle(llm)


def test_requests_that_name_no_seed_differ_and_the_engine_s_seed_decides_how(make_llm: MakeLLM, prompts: Prompts) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)

    def ask(seed: int) -> list[tuple[int, ...]]:
        llm = make_llm("llama", budget=14, seed=seed)
        outputs = [*llm.generate([prompts[1]] * 2, params), *llm.generate([prompts[1]], params)]
        return [tuple(output.token_ids) for output in outputs]

    first, other = ask(3), ask(4)
    assert len({*first, *other}) == 6
    assert ask(3) == first


# Ends -----------------------------------------------------------------------------------------------------------------


def test_stop_token_ends_the_output_and_frees_it(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected) -> None:
    llm, tokens = make_llm("llama", budget=110), expected("llama")[1]
    stop = tokens[6]
    end = tokens.index(stop)
    outputs = llm.generate(prompts[:2], [greedy(), greedy(stop_token_ids=[stop])])
    assert outputs[1].token_ids == tokens[: end + 1] and outputs[1].finish_reason == "stop"
    assert outputs[1].text == llm.tokenizer.decode(tokens[:end])
    assert outputs[0].token_ids == expected("llama")[0] and outputs[0].finish_reason == "length"
    late = llm.generate([prompts[1]], greedy(stop_token_ids=[stop], min_tokens=end + 2))[0].token_ids
    assert len(late) >= end + 2 and late[:end] == tokens[:end] and stop not in late[: end + 2]
    check_idle(llm)


def test_stop_string_is_cut_off_unless_it_is_asked_for(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm("llama", budget=110)
    text = llm.tokenizer.decode(expected("llama")[2])
    stop = text[len(text) // 2 :][:4]
    before = text[: text.index(stop)]
    cut = llm.generate([prompts[2]], greedy(stop=[stop]))[0]
    assert (cut.text, cut.finish_reason) == (before, "stop")
    assert cut.token_ids == expected("llama")[2][: len(cut.token_ids)]
    assert llm.generate([prompts[2]], greedy(stop=[stop], include_stop_str_in_output=True))[0].text == before + stop
    check_idle(llm)


def test_the_model_s_end_token_stops_unless_ignored(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    plain = make_llm("llama", budget=110)
    tokens = plain.generate([prompts[3]], greedy())[0].token_ids
    end = tokens.index(tokens[4])
    ending = replace(plain.engine.loaded, end_token_ids=frozenset({tokens[4]}))
    llm = LLM(ending, config=SpeContextConfig(budget=110, sink=2, recent=4))
    stopped = llm.generate([prompts[3]], greedy(ignore_eos=False))[0]
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[: end + 1], "stop")
    assert llm.generate([prompts[3]], greedy())[0].token_ids == tokens


def test_the_model_s_maximum_ends_an_output(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected) -> None:
    llm = make_llm("llama", budget=110, offload_layers=2, max_model_len=53)
    output = llm.generate([prompts[1]], greedy())[0]
    assert (output.token_ids, output.finish_reason) == (expected("llama")[1][:6], "length")
    check_idle(llm)


# Streams and aborts ---------------------------------------------------------------------------------------------------


def test_streaming_equals_generate(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=14, offload_layers=2, max_num_batched_tokens=19)
    whole = llm.generate([prompts[2]], greedy())[0]
    llm.engine.reset_prefix_cache()
    parts = list(llm.stream(prompts[2], greedy()))
    assert [len(part.token_ids) for part in parts] == list(range(1, 25))
    assert (parts[-1].token_ids, parts[-1].text, parts[-1].finish_reason) == (whole.token_ids, whole.text, "length")
    assert all(whole.text.startswith(part.text) for part in parts)
    timing = {"queue_s", "ttft_s", "tpot_s", "step_s", "expected_step_s", "selection_s_per_step"}
    assert {k: v for k, v in parts[-1].stats.items() if k not in timing} == {
        k: v for k, v in whole.stats.items() if k not in timing
    }
    check_idle(llm)


def test_two_streams_at_once_each_show_their_whole_output(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=14)
    whole = [output.token_ids for output in llm.generate(prompts[:2], greedy())]
    first, second = llm.stream(prompts[0], greedy()), llm.stream(prompts[1], greedy())
    next(second)
    *_, last_first = first
    *_, last_second = second
    assert [last_first.token_ids, last_second.token_ids] == whole
    assert last_second.finish_reason == "length" and last_second.stats
    check_idle(llm)


def ended_streams(llm: LLM, prompt: list[int], params: SamplingParams) -> Iterator[str]:
    stream = llm.stream(prompt, params)
    stream.close()  # type: ignore[attr-defined]
    yield "before the first token"
    stream = llm.stream(prompt, params)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    yield "after the first token"
    stream = llm.stream(prompt, params)
    next(stream)
    del stream
    yield "forgotten"


def test_leaving_a_stream_frees_what_it_held(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=14, offload_layers=2)
    for _ in ended_streams(llm, prompts[2], greedy()):
        check_idle(llm)


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_abort_at_any_time_frees_and_leaves_others_alone(
    steps: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Callable[[str, str], list[list[int]]]
) -> None:
    llm = make_llm("llama", budget=12, offload_layers=2, max_num_batched_tokens=30, max_num_seqs=3)
    engine = llm.engine
    generations = [engine.add_request(f"r{i}", prompt, greedy()) for i, prompt in enumerate(prompts)]
    for _ in range(steps):
        engine.step()
    engine.abort("r2")
    engine.abort("unknown")
    engine.check_integrity()
    while engine.has_work:
        engine.step()
    assert generations[2].request.finish_reason == "abort"
    for i in (0, 1, 3):
        assert generations[i].request.output_token_ids == alone("llama", "speculative")[i]
    check_idle(llm)


def test_reconfigure_equals_a_fresh_engine(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Callable[[str, str], list[list[int]]], expected: Expected
) -> None:
    llm = make_llm("llama", "full")
    for method in ("speculative", "streaming"):
        llm.reconfigure(make_llm("llama", method, budget=12, offload_layers=2).config)
        assert tokens_of(llm, prompts, greedy()) == alone("llama", method)
    llm.reconfigure(make_llm("llama", "full", offload_layers=1).config)
    assert tokens_of(llm, prompts, greedy()) == expected("llama")
