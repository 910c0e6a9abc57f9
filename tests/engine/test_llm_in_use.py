"""An `LLM` as programs use it: from several threads, interrupted, in a `with`, with prompts of all sorts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.core import RequestOutput
from specontext.engine.interruptions import Interruptions
from specontext.errors import EngineClosedError, LogitsError, RequestError

MakeLLM = Callable[..., LLM]
PROMPTS = [list(range(5 + number, 30 + 2 * number)) for number in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def llm(make_llm: MakeLLM) -> Iterator[LLM]:
    with make_llm("llama", budget=20, max_model_len=128, offload_layers=-1) as made:
        yield made
        made.engine.check_integrity()
        assert not made.engine.has_work


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


# Threads ------------------------------------------------------------------------------------------------------------------


def test_threads_share_an_llm(llm: LLM) -> None:
    alone = [ids(llm.generate([prompt], GREEDY))[0] for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert [ids(made)[0] for made in pool.map(lambda prompt: llm.generate(prompt, GREEDY), PROMPTS)] == alone
        assert [list(made)[-1].token_ids for made in pool.map(lambda p: list(llm.stream(p, GREEDY)), PROMPTS)] == alone


def test_threads_share_weights(llm: LLM) -> None:
    other = LLM(llm.engine.loaded, retrieval_head=None, config=SpeContextConfig(method="full"), max_model_len=128)
    alone = [ids(one.generate(PROMPTS, GREEDY)) for one in (llm, other)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda one: ids(one.generate(PROMPTS, GREEDY)), (llm, other))) == alone
    other.close()


def test_what_fails_for_one_call_fails_there(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call runs the steps of the others, too, and what breaks for them in one is theirs."""
    stream = llm.stream(PROMPTS[0], GREEDY)
    step = llm.engine.step

    def broken() -> list[Any]:
        touched = step()
        llm.engine.abort("request-0")
        monkeypatch.undo()
        raise LogitsError(["request-0"]) if touched else AssertionError("nothing was run")

    monkeypatch.setattr(llm.engine, "step", broken)
    assert ids(llm.generate([PROMPTS[1]], GREEDY)) == ids(llm.generate([PROMPTS[1]], GREEDY))
    with pytest.raises(LogitsError, match="request-0"):
        list(stream)


def test_a_call_whose_engine_is_closed_beside_it_says_so(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm("llama", budget=20, max_model_len=128)
    step = llm.engine.step

    def last() -> list[Any]:
        touched = step()
        llm.close()
        return touched

    monkeypatch.setattr(llm.engine, "step", last)
    with pytest.raises(EngineClosedError, match="before the output had ended"):
        llm.generate(PROMPTS[0], GREEDY)


# Ctrl-C -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["scheduler.schedule", "runner.run", "parts.kv.read", "intake.generation", "scheduler.finish"])
def test_an_interruption_in_the_middle_of_a_step_waits_for_its_end(place: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ids(llm.generate(PROMPTS[:3], GREEDY))
    *path, name = place.split(".")
    owner: Any = llm.engine
    for part in path:
        owner = getattr(owner, part)
    whole, done = getattr(owner, name), []

    def interrupted(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        made = whole(*given, **named)  # where an interruption would strike
        done.append(name)
        return made

    monkeypatch.setattr(owner, name, interrupted)
    for call in (lambda: llm.generate(PROMPTS[:3], GREEDY), lambda: list(llm.stream(PROMPTS[0], GREEDY))):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert done and not llm.engine.has_work
        llm.engine.check_integrity()
        done.clear()
    monkeypatch.undo()
    assert ids(llm.generate(PROMPTS[:3], GREEDY)) == wanted


def test_a_program_s_own_handler_is_called_once_and_kept() -> None:
    called: list[int] = []

    def own(number: int, frame: object) -> None:
        called.append(number)

    before = signal.signal(signal.SIGINT, own)
    try:
        with Interruptions():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert not called
        assert called == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


# Its life -----------------------------------------------------------------------------------------------------------------


def test_an_llm_closes_itself(make_llm: MakeLLM) -> None:
    with make_llm("llama", budget=20, max_model_len=128) as llm:
        stream = llm.stream(PROMPTS[0], GREEDY)
        assert next(stream).token_ids
    llm.close()
    with pytest.raises(EngineClosedError):
        next(stream)
    with pytest.raises(EngineClosedError, match="make a new one"):
        llm.generate(PROMPTS[0], GREEDY)


# What is given to it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([5, 6]), r"array\(\[5, 6\]\): give its token ids as .tolist\(\)"),
        ([torch.tensor([5, 6])], r"tensor\(\[5, 6\]\): give its token ids as .tolist\(\)"),
        ({"prompt": "a"}, "give the text or the token ids alone, without names"),
        ([{"prompt_token_ids": [5]}], "give the text or the token ids alone, without names"),
        ([{"role": "user", "content": "a"}], "messages are written out by the tokenizer's apply_chat_template"),
        (b"a", "decode it"),
        (bytearray(b"a"), "decode it"),
        ([memoryview(b"a")], "decode it"),
    ],
)
def test_what_is_no_prompt_is_refused_with_what_to_give(prompt: Any, message: str, llm: LLM) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, GREEDY)


def test_an_output_without_a_bound_fills_the_context(llm: LLM) -> None:
    unbounded = SamplingParams(temperature=0, max_tokens=None, min_tokens=5, ignore_eos=True)
    [output] = llm.generate([PROMPTS[0]], unbounded)
    assert len(PROMPTS[0]) + len(output.token_ids) == 128 and output.finish_reason == "length"
    assert output.token_ids[:8] == ids(llm.generate([PROMPTS[0]], GREEDY))[0]
