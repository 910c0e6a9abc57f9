"""What breaks inside one request ends it, with words; the others get the tokens they would have got, and no page is lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest
import torch

from specontext.engine import llm_engine, sampler
from specontext.engine.async_engine import AsyncEngine
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.llm_engine import LLMEngine
from specontext.errors import EngineDeadError, RequestFailedError
from tests.server.serving import make_engine, running
from tests.server.test_async_engine import PROMPT, collect, params, run, started, texts

MARK = 666  # seed of the requests that something breaks for
Break = Callable[[pytest.MonkeyPatch, Exception], None]


def marked(request: Any) -> bool:
    return bool(request.params.seed == MARK and len(request.token_ids) > request.prompt_length + 3)


def in_detokenizer(patch: pytest.MonkeyPatch, error: Exception) -> None:
    settled = Detokenizer._settled

    def broken(self: Any) -> str:
        if self._params.seed == MARK and self._count == 5:
            raise error
        return settled(self)

    patch.setattr(Detokenizer, "_settled", broken)


def in_shown_text(patch: pytest.MonkeyPatch, error: Exception) -> None:
    pieces: Any = Detokenizer.pieces

    def broken(self: Any) -> Any:
        if self._params.seed == MARK and self._count > 3:
            raise error
        return pieces.fget(self)

    patch.setattr(Detokenizer, "pieces", property(broken))


def in_last_text(patch: pytest.MonkeyPatch, error: Exception) -> None:
    finish = Detokenizer.finish

    def broken(self: Any) -> str:
        if self._params.seed == MARK:
            raise error
        return finish(self)

    patch.setattr(Detokenizer, "finish", broken)


def in_statistics(patch: pytest.MonkeyPatch, error: Exception) -> None:
    statistics = LLMEngine._statistics

    def broken(self: Any, generation: Any) -> Any:
        if marked(generation.request):
            raise error
        return statistics(self, generation)

    patch.setattr(LLMEngine, "_statistics", broken)


def in_sampler(patch: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken(sampler.Drawn):
        def __init__(self, logits: Any, ready: Any, ends: Any) -> None:
            if any(marked(request) for _, request in ready):
                raise error
            super().__init__(logits, ready, ends)

    patch.setattr(sampler, "Drawn", Broken)


def in_logits(patch: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken(sampler.Drawn):
        def __init__(self, logits: Any, ready: Any, ends: Any) -> None:
            rows = [row for row, request in ready if marked(request)]
            super().__init__(logits.index_fill(0, torch.tensor(rows, dtype=torch.int64), torch.nan), ready, ends)

    patch.setattr(sampler, "Drawn", Broken)


def in_prompt_logprobs(patch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: Any) -> None:
        raise error

    patch.setattr(llm_engine, "add_prompt_logprobs", broken)


BREAKS = (in_detokenizer, in_shown_text, in_last_text, in_statistics, in_sampler, in_logits, in_prompt_logprobs)


async def with_company(served: AsyncEngine) -> tuple[list[Any], Any]:
    """What three requests say while a marked one of two outputs runs beside them, and how that one ended."""
    good = [asyncio.ensure_future(collect(served.generate(f"good{i}", PROMPT[i:], params(20, logprobs=1)))) for i in range(3)]
    bad = params(20, seed=MARK, n=2, prompt_logprobs=1)
    outcome = asyncio.gather(collect(served.generate("bad", PROMPT, bad)), return_exceptions=True)
    [ended] = await outcome
    others = [texts(found) for found in await asyncio.gather(*good)]
    return others, ended if isinstance(ended, BaseException) else texts(ended)


@pytest.mark.parametrize(
    ("break_it", "overlaps"),
    [*((function, False) for function in BREAKS), (in_shown_text, True), (in_last_text, True), (in_logits, True)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_breaks_for_one_hurts_no_others(break_it: Break, overlaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started() as served:  # which checks the pages, too
            served._loop._overlaps = overlaps  # as on a GPU
            expected, whole = await with_company(served)
            assert not isinstance(whole, Exception)
            with monkeypatch.context() as patch:
                break_it(patch, KeyError("a bug"))
                found, outcome = await with_company(served)
            assert found == expected
            assert isinstance(outcome, RequestFailedError)
            assert ("not numbers" if break_it is in_logits else "a bug") in str(outcome)
            assert not served.is_dead and await with_company(served) == (expected, whole)

    run(test)


def test_different_things_may_break_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started() as served:
            alone = texts(await collect(served.generate("alone", PROMPT, params(20))))
            in_logits(monkeypatch, Exception())
            settled = Detokenizer._settled

            def broken(self: Any) -> str:
                if self._params.seed == 5 and self._count == 4:
                    raise ValueError("no such text")
                return settled(self)

            monkeypatch.setattr(Detokenizer, "_settled", broken)
            stop = "never"  # text is decoded in the step where there are stop strings, else when it is shown
            jobs = [served.generate(f"r{seed}", PROMPT, params(20, seed=seed, stop=stop)) for seed in (1, MARK, 5, 2)]
            one, logits, text, other = await asyncio.gather(*map(collect, jobs), return_exceptions=True)
            assert not isinstance(one, BaseException) and not isinstance(other, BaseException)
            assert texts(one) == texts(other) == alone
            assert isinstance(logits, RequestFailedError) and "not numbers" in str(logits) and "text" not in str(logits)
            assert isinstance(text, RequestFailedError) and "ValueError: no such text" in str(text)

    run(test)


def test_a_request_that_breaks_before_it_is_queued_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *_: Any) -> Any:
        raise KeyError("a bug")

    async def test() -> None:
        async with started() as served:
            with monkeypatch.context() as patch:
                patch.setattr(Detokenizer, "_last_text", broken)
                with pytest.raises(RequestFailedError, match="a bug"):
                    await served.submit("bad", [PROMPT, PROMPT], params())
            assert not await served.call(lambda engine: engine.has_work)
            assert len(texts(await collect(served.generate("good", PROMPT, params(5))))[0][1]) == 5

    run(test)


@pytest.mark.parametrize("break_it", [in_detokenizer, in_sampler], ids=lambda function: function.__name__)
def test_a_device_that_fails_is_nobody_s_fault(break_it: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started() as served:
            break_it(monkeypatch, torch.AcceleratorError("unspecified launch failure"))
            with pytest.raises(EngineDeadError, match=r"AcceleratorError|GPU has failed"):
                await collect(served.generate("bad", PROMPT, params(20, seed=MARK, stop="never")))
            assert served.is_dead

    run(test)


def test_a_sampler_that_works_for_nobody_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started() as served:
            in_sampler(monkeypatch, KeyError("a bug"))
            together = await served.submit("all", [PROMPT[i:] for i in range(3)], params(20, seed=MARK))
            with pytest.raises(EngineDeadError, match="a bug"):
                await collect(together)

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_are_told(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, "temperature": 0, "stream": stream}
    with running(make_engine()) as server:
        before = server.post("/v1/completions", body | {"stream": False}).json()["choices"]
        in_detokenizer(monkeypatch, KeyError("a bug"))
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            good = [threads.submit(server.post, "/v1/completions", body | {"stream": False}) for _ in range(3)]
            bad = server.post("/v1/completions", body | {"seed": MARK})
            assert [answer.result().json()["choices"] for answer in good] == [before] * 3
        assert "a bug" in bad.text and '"code": "request_failed"' in bad.text.replace('":"', '": "')
        assert bad.status_code == (200 if stream else 500) and bad.text.endswith("data: [DONE]\n\n") == stream
        assert server.get("/health").status_code == 200
        server.check_idle()
