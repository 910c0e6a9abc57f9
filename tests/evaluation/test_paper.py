"""The parts of the paper's tables by themselves: sums over sampled steps, numbers of requests, and what each system loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specontext.evaluation.paper import hugging_face, results
from specontext.evaluation.paper.bench import Bench, TheirStep, measured, open_bench
from specontext.evaluation.paper.columns import SCALES, TABLES, Column
from specontext.evaluation.paper.hugging_face import EAGER, SDPA, Theirs
from specontext.evaluation.paper.loop import ABLATION, FULL, OURS, Way, looping, wait_for_loads
from specontext.evaluation.paper.parts import Part, parts_of, search, their_most, their_row
from specontext.evaluation.paper.progress import Progress
from specontext.evaluation.paper.results import link, run_parts, with_ratios
from specontext.models.loading import LoadedModel

CPU = torch.device("cpu")
TINY = SCALES["tiny"]
COLUMN = Column("[2k,16k]", 32, 256)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    yield open_bench("llama-3.1-8b", TINY, CPU, memory=None, host_memory=1 << 30, overlap=0.85)


def test_steps_that_grow_evenly_are_summed_exactly() -> None:
    column = Column("", 100, 1001)
    steps = {length: 1 + length / 1000 for length in column.lengths(4)}
    assert list(steps) == [100, 434, 767, 1101]
    mean = 1 + (100 + 1101) / 2 / 1000
    assert column.decode_seconds(steps) == pytest.approx(1000 * mean)
    assert column.lengths(1) == [600] and column.decode_seconds({600: 0.5}) == 500


def test_every_part_has_its_own_name_and_file() -> None:
    for scale in SCALES.values():
        parts = [part for table in TABLES.values() for part in parts_of(table, scale)]
        assert len({(part.name, part.file_name) for part in parts}) >= len(parts) - 3, "concurrency and single share lengths"
        for table in TABLES.values():
            names = [part.file_name for part in parts_of(table, scale)]
            assert len(set(names)) == len(names) and not any("/" in name or "[" in name for name in names)


def test_columns_have_the_paper_s_lengths() -> None:
    assert [(c.prompt, c.output) for c in SCALES["full"].columns] == [
        (2048, 16384),
        (2048, 32768),
        (16384, 2048),
        (32768, 2048),
    ]


def test_as_many_requests_as_make_the_most_tokens_a_second(bench: Bench) -> None:
    chosen = bench.requests_for(OURS, COLUMN)
    rates = {count: bench.expected(OURS, COLUMN, count) for count in range(1, TINY.most_requests + 1)}
    fitting = {count: rate for count, rate in rates.items() if rate is not None}
    assert chosen == max(fitting, key=lambda count: fitting[count])
    assert bench.requests_for(OURS, COLUMN, most=2) == 2
    small = replace(bench, memory=1 << 20, host_memory=1 << 30)
    full, ours = small.requests_for(FULL, COLUMN), small.requests_for(OURS, COLUMN)
    assert full is not None and ours is not None and 1 <= full < TINY.most_requests
    assert small.away(FULL, full + 1, COLUMN.longest, COLUMN.longest) is None, "full never leaves the device"
    assert replace(bench, memory=1000).requests_for(OURS, COLUMN) is None


def test_what_does_not_fit_is_a_row_that_says_so(bench: Bench) -> None:
    row = measured(bench, "full", "", COLUMN, 99, lambda: replace(bench, memory=1000).ours(FULL, COLUMN, 99))
    assert "99 requests" in row["error"] and row["tokens_per_s"] is None and row["too_many"]
    assert "not even one" in measured(bench, "full", "", COLUMN, None, dict)["error"]


def test_a_request_of_hugging_face_s_runs_as_far_as_its_memory_goes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(loaded: LoadedModel, way: Theirs, *, requests: int, lengths: list[int], **_: object) -> dict[int, float]:
        if max(lengths) > reach:
            raise torch.OutOfMemoryError("out of memory")
        return dict.fromkeys(lengths, 0.1)

    column = Column("[2k,16k]", 32, 256)
    monkeypatch.setattr(hugging_face, "decode_steps", steps)
    monkeypatch.setattr(hugging_face, "prefill_seconds", lambda *_, **__: 0.3)
    bench, reach = replace(bench, progress=Progress(), scale=replace(TINY, points=5)), 288
    whole = their_row(bench, EAGER, column, 1)
    assert "reached" not in whole and whole["tokens_per_s"] == pytest.approx(256 / (0.3 + 255 * 0.1))
    reach = 170
    row = their_row(replace(bench, progress=Progress()), EAGER, column, 1)
    assert row["reached"] == 160 and list(row["step_s"]) == ["32", "96", "160"] and row["output"] == 256
    assert row["tokens_per_s"] == pytest.approx(128 / (0.3 + 127 * 0.1)) and row["decode_over_floor"] > 0
    reach = 31
    assert their_row(replace(bench, progress=Progress()), EAGER, column, 1)["too_many"]
    reach = 170
    assert their_row(replace(bench, progress=Progress()), EAGER, column, 2)["too_many"], "fewer of them might reach the end"


def test_hugging_face_s_steps_are_those_of_the_faster_kernels(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, column = hugging_face.decode_steps, Column("[2k,16k]", 32, 256)

    def slow_plans(*given: object, cudnn: bool, **others: object) -> dict[int, float]:
        measure(*given, cudnn=cudnn, **others)  # type: ignore[arg-type]
        allowed.append(cudnn)
        return {length: 0.5 if cudnn else length / 1000 for length in others["lengths"]}  # type: ignore[attr-defined]

    cuda = torch.device("cuda")
    assert hugging_face.kernel_choices(SDPA, cuda) == (True, False) and hugging_face.kernel_choices(EAGER, cuda) == (True,)
    allowed: list[bool] = []
    monkeypatch.setattr(hugging_face, "decode_steps", slow_plans)
    row = their_row(replace(bench, progress=Progress()), SDPA, column, 2)
    assert set(allowed) == {True} and "step_s_by_default" not in row, "a CPU has no such kernels"
    monkeypatch.setattr(hugging_face, "kernel_choices", lambda way, device: (True, False))
    row = their_row(replace(bench, progress=Progress()), SDPA, column, 2)
    assert all(seconds == min(0.5, int(length) / 1000) for length, seconds in row["step_s"].items())
    assert set(row["step_s_by_default"].values()) == {0.5} and torch.backends.cuda.cudnn_sdp_enabled()
    with hugging_face.attending(bench.loaded, SDPA, cudnn=False):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_prompt_that_does_not_fit_hugging_face_at_once_is_read_in_chunks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, passes = bench.loaded.model.forward, []

    def at_most_100(*, input_ids: torch.Tensor, **others: object) -> object:
        if input_ids.shape[1] > 100:
            raise torch.OutOfMemoryError("out of memory")
        passes.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **others)

    monkeypatch.setattr(bench.loaded.model, "forward", at_most_100)
    column = Column("[2k,16k]", 256, 4)
    row = their_row(replace(bench, progress=Progress()), EAGER, column, 1)
    assert row["prefill_chunk"] == 64 and passes.count(64) == 2 * 4 and row["prefill_s"] > 0
    assert their_row(replace(bench, progress=Progress()), EAGER, column, 2)["too_many"], "fewer of them might read it at once"


def test_where_an_engine_has_less_room_than_was_planned_more_layers_leave(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Bench, way: Way, requests: int, length: int, away: int) -> float:
        if away < 2:
            raise torch.OutOfMemoryError("out of memory")
        return 0.1

    monkeypatch.setattr(Bench, "_step", step)
    assert bench.steps(OURS, COLUMN, 1, [COLUMN.prompt]) == {COLUMN.prompt: (0.1, 2)}
    with pytest.raises(torch.OutOfMemoryError):
        bench.steps(FULL, COLUMN, 1, [COLUMN.prompt])


def test_the_last_steps_before_a_models_longest_context_are_sampled(bench: Bench) -> None:
    """A single request at 128K: the steps that are timed must not go beyond 131,072 tokens."""
    shape = replace(bench.loaded.shape, max_position=300)
    short = replace(bench, loaded=replace(bench.loaded, shape=shape))
    (steps,) = short.steps(OURS, Column("300", 300, 0), 1, [300]).values()
    assert steps[0] > 0


def test_hugging_face_gets_fewer_requests_where_its_growing_cache_outgrows_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(self: Bench, way: Theirs, requests: int, lengths: list[int], *, steps: int | None = None) -> dict[int, TheirStep]:
        if requests > 4 and steps is None:  # all lengths in a row, which the search has not run
            raise torch.OutOfMemoryError("out of memory")
        return dict.fromkeys(lengths, TheirStep(0.1, 0.1))

    monkeypatch.setattr(Bench, "_their_steps", steps)
    assert bench.most_of_theirs(SDPA, COLUMN) == TINY.most_requests == 8
    found = their_most(replace(bench, progress=Progress()), SDPA, COLUMN)
    assert found["requests"] == 4 and found["tokens_per_s"] and "error" not in found


def test_hugging_face_may_be_faster_beyond_a_number_that_is_slower(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search goes on to whatever fits, so that a stall of one number does not end it."""
    rates = {1: 10.0, 4: 5.0, 8: 20.0}

    def steps(self: Bench, way: Theirs, requests: int, lengths: list[int], *, steps: int | None = None) -> dict[int, TheirStep]:
        return dict.fromkeys(lengths, TheirStep(requests / rates[requests], 1.0))

    monkeypatch.setattr(Bench, "_their_steps", steps)
    assert bench.most_of_theirs(SDPA, COLUMN) == 8
    rates[8] = 9.0
    assert bench.most_of_theirs(SDPA, COLUMN) == 1


def test_the_choice_is_judged_by_whole_columns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests are faster at the mean length here, and slower at the longest, where layers are away."""
    asked: list[tuple[int, int]] = []

    def steps(self: Bench, way: Way, column: Column, requests: int, lengths: list[int]) -> dict[int, tuple[float, int]]:
        asked.extend((requests, length) for length in lengths)
        return {length: (1.0 if length < column.longest or requests <= 4 else 9.0, 0) for length in lengths}

    monkeypatch.setattr(Bench, "steps", steps)
    monkeypatch.setattr(Bench, "requests_for", lambda *_: 4)
    monkeypatch.setattr(Bench, "prefill_s", lambda *_: 0.0)
    theirs = lambda self, way, requests, lengths, steps=None: dict.fromkeys(lengths, TheirStep(1.0, 1.0))  # noqa: E731
    monkeypatch.setattr(Bench, "_their_steps", theirs)
    found = search(replace(bench, progress=Progress()), COLUMN)[-1]
    assert found["best_requests"] == 4 and found["choice_over_best"] == 1.0
    assert list(found["searched"]) == ["3", "4", "5"], "no further than what is worse already"
    assert {length for requests, length in asked if requests == 5} == set(COLUMN.lengths(3))


def loaded_rows(bench: Bench, way: Way, overlap: float = 0.85) -> float:
    """Rows of a KV head, layer and request that a step loads, in the mean over some steps."""
    options: dict[str, Any] = {"requests": 2, "context": 400, "budget": 32, "away": 4, "overlap": overlap, "room": 10}
    with looping(bench.loaded, way, **options) as loop:
        for _ in range(8):
            loop.step()
        counted = sum(loop.engine.parts.meter.report(seat).bytes_loaded_per_step or 0.0 for seat in range(2))
    shape = bench.facts.shape
    return counted / (2 * shape.layers * shape.kv_heads * shape.row_bytes)


def test_what_each_step_of_the_ablation_loads(bench: Bench) -> None:
    c1, c2 = ABLATION[:2]
    scored = 32 - 4 - 16
    assert loaded_rows(bench, c1) == pytest.approx(scored, rel=0.1), "all that was selected, in every step"
    assert loaded_rows(bench, c2) < 0.5 * scored, "only what the last step did not select"
    assert loaded_rows(bench, OURS, overlap=0.5) > loaded_rows(bench, OURS, overlap=0.9)


def test_loads_are_waited_for_where_nothing_runs_beside_them(bench: Bench) -> None:
    options: dict[str, Any] = {"requests": 1, "context": 100, "budget": 32, "away": 4, "overlap": 0.85, "room": 4}
    with looping(bench.loaded, ABLATION[1], **options) as loop:
        joined: list[str] = []
        loop.engine.parts.kv.transfers.join = lambda *sides: joined.extend(sides)  # type: ignore[method-assign]
        loop.step()
        before = joined.count("prefetch")
        wait_for_loads(loop.engine.parts)
        loop.step()
        assert joined.count("prefetch") == before + 1


def test_ratios_are_taken_within_a_part_and_linked_between_parts() -> None:
    def row(part: str, system: str, rate: float | None) -> dict[str, Any]:
        return {"part": part, "model": "m", "column": "c", "system": system, "tokens_per_s": rate}

    first = with_ratios([row("a", "hf-sdpa", 10.0), row("a", "hf-eager, 4 requests", 5.0), row("a", "full", None)])
    second = with_ratios([row("b", "hf-sdpa", 20.0), row("b", "ours", 60.0)])
    assert first[1]["over_hf_sdpa"] == 0.5 and first[2]["over_hf_sdpa"] is None and second[1]["over_hf_sdpa"] == 3
    assert second[1]["over_hf_eager_4"] is None
    linked = link([*first, *second])[-1]
    assert linked["over_hf_eager_4"] == 6 and linked["linked"] == ["over_hf_eager_4"] and linked["over_full"] is None
    third = with_ratios([row("c", "full", 20.0), row("c", "hf-sdpa", 10.0)])
    fourth = with_ratios([row("d", "hf-sdpa", None), row("d", "full", 10.0), row("d", "ours", 30.0)])
    assert link([*third, *fourth])[-1]["over_hf_sdpa"] == 6, "by way of our full attention where there is no SDPA"
    fifth = with_ratios([row("e", "full", 20.0), row("e", "hf-sdpa", 10.0), row("e", "hf-static", 5.0)])
    sixth = with_ratios([row("f", "full", 20.0), row("f", "hf-sdpa", 1.0), row("f", "ours", 40.0)])
    assert link([*fifth, *sixth])[-1]["over_hf_static"] == 8, "and not of SDPA where there are both"


@dataclass(frozen=True)
class NoBench:
    """What parts get that measure nothing."""

    loaded: SimpleNamespace
    progress: Progress | None = None


def test_what_is_left_of_a_part_says_nothing_of_how_long_others_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a minute and of ten, in five minutes: the first is broken off, and done in six seconds another time."""
    now, dies = [0.0], [True]
    monkeypatch.setattr(results, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(results, "open_bench", lambda *_, **__: NoBench(SimpleNamespace(name="model")))

    def rows(bench: Any) -> list[Any]:
        now[0] += 6 * bench.progress.once("first", lambda: 1)
        if dies[0]:
            raise KeyboardInterrupt
        return [{"model": "model", "column": "c", "system": "full", "tokens_per_s": 1.0}]

    parts = [Part("model/short", "model", 1.0, rows), Part("model/long", "model", 10.0, rows)]
    options: dict[str, Any] = {"folder": tmp_path, "host_memory": None, "overlap": 0.85, "minutes": 5.0}
    with pytest.raises(KeyboardInterrupt):
        run_parts(TABLES["single"], SCALES["full"], parts, CPU, **options)
    dies[0] = False
    found, left = run_parts(TABLES["single"], SCALES["full"], parts, CPU, **options)
    assert [one["part"] for one in found] == ["model/short"] and left == parts[1:]
    (tmp_path / "model_short.json").unlink()  # measured as a whole it does
    found, left = run_parts(TABLES["single"], SCALES["full"], parts, CPU, **options)
    assert [one["part"] for one in found] == ["model/short", "model/long"] and not left
