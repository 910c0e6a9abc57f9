"""An engine that is dropped or closed gives its memory back at once, without the garbage collector having to find it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext import LLM, ConfigError, SamplingParams, SpeContextConfig
from specontext.engine import llm_engine, start
from specontext.engine.async_engine import AsyncEngine
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.runner import ModelRunner
from specontext.errors import DeviceMemoryError, EngineClosedError, RequestError, RequestFailedError, SpeContextError
from specontext.kv import host_memory
from specontext.models.loading import LoadedModel, load_model
from tests.server.serving import make_engine, running

Refs = dict[str, weakref.ref[Any]]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = [7] * 100


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Tensors of a GPU do not weigh on Python's collector: it may not run for a long time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def watch(engine: LLMEngine) -> Refs:
    """Everything large that an engine has, and what holds it."""
    parts, methods = engine.parts, engine.parts.methods
    held = {
        "engine": engine,
        "runner": engine.runner,
        "scheduler": engine.scheduler,
        "arena": parts.kv.arena.rows,
        "host": parts.kv.host.rows,
        "kv": parts.kv,
        "hot": parts.kv.hot,
        "head": parts.head,
        "meter": parts.meter,
        "prefix": parts.prefix,
        "methods": methods,
        **{f"selector {name}": one for name, one in methods.selectors.items()},
        "model": engine.loaded.model,
        "embedding": engine.loaded.model.get_input_embeddings().weight,
    }
    return {name: weakref.ref(one) for name, one in held.items() if one is not None}


def alive(refs: Refs, *but: str) -> list[str]:
    return [name for name, reference in refs.items() if name not in but and reference() is not None]


def make(method: str = "speculative", model: str | LoadedModel = "nano", **options: Any) -> LLM:
    head = "auto" if method == "speculative" else None
    config = SpeContextConfig(method=method, budget=64, offload_layers=options.pop("offload_layers", None))
    return LLM(model, head, config, device="cpu", max_model_len=512, **options)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("nano", dtype="float32", device=torch.device("cpu"))


def hooks(loaded: LoadedModel) -> int:
    modules = loaded.model.modules()
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules)


@pytest.mark.parametrize("close", [False, True], ids=["dropped", "closed"])
@pytest.mark.parametrize("method", ["speculative", "full", "quest", "oracle", "snapkv", "h2o", "streaming"])
def test_after_generating(method: str, close: bool) -> None:
    llm = make(method)
    llm.generate([PROMPT, [*PROMPT, 8], [9] * 30], PARAMS)
    refs = watch(llm.engine)
    if close:
        llm.engine.close()
        assert not alive(refs, "engine"), "the engine itself is an empty shell"
    del llm
    assert not alive(refs)


def test_with_layers_on_the_move_and_requests_that_wait() -> None:
    llm = make(gpu_memory=600_000, max_num_seqs=3)
    jobs = [llm.stream([7 + i] * 150, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)) for i in range(3)]
    for _ in range(40):
        for job in jobs:
            next(job)
    assert llm.engine.parts.residency.num_moves or llm.engine.parts.kv.move is not None or llm.engine.parts.kv.parked
    refs = watch(llm.engine)
    del llm, jobs, job
    assert not alive(refs)


def test_after_streams_were_left() -> None:
    llm = make()
    for _ in range(2):
        for _ in llm.stream(PROMPT, PARAMS):
            break
    left, begun = llm.stream(PROMPT, PARAMS), llm.stream(PROMPT, PARAMS)
    next(begun)
    refs = watch(llm.engine)
    del llm
    assert alive(refs), "whoever reads a stream still needs the engine"
    del left, begun
    assert not alive(refs)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), DeviceMemoryError("no memory"), MemoryError(), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["runner._forward", "scheduler.advance", "llm_engine.next_tokens", "detokenizer"])
def test_after_an_error_in_generate(error: BaseException, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, calls = make(), iter(range(100))

    def fails(real: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == 3:
                raise error
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if place == "detokenizer":
            patch.setattr(Detokenizer, "append", fails(Detokenizer.append))
        elif place == "llm_engine.next_tokens":
            patch.setattr(llm_engine, "next_tokens", fails(llm_engine.next_tokens))
        else:
            room, name = place.split(".")
            target = getattr(llm.engine, room)
            patch.setattr(target, name, fails(getattr(target, name)))
            del target
        with pytest.raises((type(error), RequestFailedError)) as caught:
            llm.generate([PROMPT, [8] * 40], PARAMS)
    refs = watch(llm.engine)
    error.__traceback__ = None
    del caught, fails, llm
    assert not alive(refs)


def test_after_refusals() -> None:
    llm = make()
    for prompt in ([], [10**6], [5] * 600):
        with pytest.raises(RequestError):
            llm.generate([PROMPT, prompt], PARAMS)
    refs = watch(llm.engine)
    del llm
    assert not alive(refs)


def test_of_a_model_that_lives_on(loaded: LoadedModel) -> None:
    """Nothing is left on it: hooks would keep the states of every later step of any engine."""
    before = hooks(loaded)
    for close in (False, True):
        llm = make(model=loaded)
        assert hooks(loaded) > before
        llm.generate([PROMPT], PARAMS)
        refs = watch(llm.engine)
        if close:
            llm.engine.close()
        del llm
        assert not alive(refs, "model", "embedding") and hooks(loaded) == before
    assert make(model=loaded).generate([PROMPT], PARAMS)[0].token_ids


def test_of_an_engine_that_was_reconfigured(loaded: LoadedModel) -> None:
    llm = make(model=loaded)
    expected = llm.generate([PROMPT], PARAMS)[0].token_ids
    first = watch(llm.engine)
    made: list[list[str]] = []
    build = llm_engine.build_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            llm_engine, "build_parts", lambda *a: made.append(alive(first, "model", "embedding", "engine")) or build(*a)
        )
        llm.reconfigure(SpeContextConfig(method="streaming", budget=64), retrieval_head=None)
    assert made == [[]], "there is no room for two engines at once"
    assert not alive(first, "model", "embedding")
    second, hooked = watch(llm.engine), hooks(loaded)
    with pytest.raises(ConfigError):
        llm.reconfigure(SpeContextConfig(method="streaming", budget=64, offload_layers=99), retrieval_head=None)
    assert not alive(second, "model", "embedding") and hooks(loaded) == hooked
    assert llm.config.method == "streaming" and llm.generate([PROMPT], PARAMS)[0].token_ids
    llm.reconfigure(SpeContextConfig(budget=64))
    assert llm.generate([PROMPT], PARAMS)[0].token_ids == expected


@pytest.mark.parametrize("options", [{"gpu_memory": 1}, {"host_memory": 1}, {"offload_dir": Path("/no/such/place")}])
def test_of_an_engine_that_could_not_be_made(options: dict[str, Any], loaded: LoadedModel) -> None:
    before, models = hooks(loaded), []
    load = start.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "load_model", lambda *a, **o: models.append(weakref.ref((one := load(*a, **o)).model)) or one)
        for model in ("nano", loaded):
            with pytest.raises(SpeContextError):
                make(model=model, **options)  # type: ignore[arg-type]
    assert [model() for model in models] == [None] and hooks(loaded) == before


def test_closing_ends_what_runs_and_what_comes_later_is_refused() -> None:
    llm = make()
    stream = llm.stream(PROMPT, PARAMS)
    next(stream)
    engine = llm.engine
    engine.close()
    engine.close()
    assert engine.closed and not engine.has_work
    with pytest.raises(EngineClosedError, match="before the output had ended"):
        next(stream)
    for use in (lambda: llm.generate([PROMPT]), engine.step, lambda: llm.shape, lambda: llm.config, engine.check_integrity):
        with pytest.raises(EngineClosedError, match="the engine was closed"):
            use()
    assert not hasattr(LLMEngine, "parts") and not hasattr(llm.tokenizer, "parts")
    with pytest.raises(AttributeError, match="no_such_thing"):
        engine.no_such_thing  # type: ignore[attr-defined]  # noqa: B018


def test_of_an_engine_behind_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    refs: Refs = {}

    append, broken = Detokenizer.append, SamplingParams(seed=12345)

    def fails(self: Any, tokens: Any) -> bool:
        if self._params.seed == broken.seed:
            raise RuntimeError("a bug")
        return append(self, tokens)

    monkeypatch.setattr(Detokenizer, "append", fails)

    async def live(fail: bool) -> None:
        engine = make_engine()
        refs.update(watch(engine))
        served = AsyncEngine(engine)
        del engine
        served.start()
        async for _ in served.generate("one", PROMPT, PARAMS):
            pass
        with pytest.raises(RequestFailedError):
            async for _ in served.generate("broken", PROMPT, broken):
                pass
        left = await served.submit("left", [PROMPT], PARAMS)
        failing = await served.submit("two", [PROMPT], SamplingParams(max_tokens=400, ignore_eos=True))
        if fail:
            served.abort_all(SpeContextError("enough"))
        await served.close()
        assert not alive(refs, "engine") and served.running == served.waiting == 0
        del left, failing

    for fail in (False, True):
        asyncio.run(live(fail))
        assert not alive(refs, "engine")


def test_of_a_server_that_was_stopped() -> None:
    engine = make_engine()
    refs = watch(engine)
    with running(engine) as server:
        del engine
        body = {"prompt": "the sun", "max_tokens": 4}
        assert server.post("/v1/completions", body).status_code == 200
        assert server.post("/v1/completions", body | {"prompt": [10**6]}).status_code == 400
        server.get("/metrics")
    assert not alive(refs, "engine")


def test_host_memory_is_unpinned_once_and_not_before_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(host_memory, "register", lambda address, size: 0)
    monkeypatch.setattr(host_memory, "settle", lambda: events.append("idle"))
    monkeypatch.setattr(host_memory, "unregister", lambda address: events.append("unpinned") or 0)
    for close in (False, True):
        memory = host_memory.HostMemory(1 << 20, pinned=True)
        memory.reach(1 << 20)
        if close:
            memory.close()
        del memory
        assert events == ["idle", "unpinned"]
        events.clear()


def test_modules_that_were_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler keeps what it looked at in cycles; they go with the engine. Here it makes no code, which takes its time."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, backend="eager"))
    llm = make(dtype="bfloat16")
    runner = llm.engine.runner
    forward, calls = ModelRunner._forward, []

    def compiled(self: ModelRunner, batch: Any) -> torch.Tensor:
        if batch.prefills:
            return forward(self, batch)
        calls.append(batch)
        assert self._compiled is not None
        with self._compiled.use(len(batch.token_ids)):  # as captured steps are, for which it takes a GPU
            return forward(self, batch)

    monkeypatch.setattr(ModelRunner, "_forward", compiled)
    llm.generate([PROMPT], PARAMS)
    refs = watch(llm.engine)
    assert calls and runner._compiled is not None and runner._compiled._functions
    del llm, runner
    calls.clear()
    assert not alive(refs)
