"""The parts of a table: each runs by itself in a few minutes and repeats Hugging Face's SDPA and our full attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from specontext.evaluation.paper.bench import Bench, Row, measured
from specontext.evaluation.paper.columns import PAPER_EAGER_REQUESTS, Column, Scale, TablePlan
from specontext.evaluation.paper.hugging_face import EAGER, OFFLOADED, SDPA, STATIC, Theirs
from specontext.evaluation.paper.loop import ABLATION, FULL, OURS, OURS_EAGER, QUEST, SHADOWKV, Way, free, now

Rows = Callable[[Bench], list[Row]]
OVERLAPS = (0.5, 0.7, 0.85, 0.9, 0.95, 0.98)
NEIGHBOURS = ((0.85, 0.7), (1.15, 1.4))  # of the plan's number of requests, that are searched while they are better
SEARCH_POINTS = 3  # lengths at which they decode
FEWER = 0.75  # of the requests that memory turned out not to hold
PROVEN = 8  # requests of the whole run, at most


@dataclass(frozen=True)
class Part:
    """Something that is measured in one go.

    Attributes:
        name: model/column/systems.
        minutes: that it takes on one H100, about; estimated.
        rank: those of a lower one matter more, and run first.
    """

    name: str
    model: str
    minutes: float
    rows: Rows
    rank: int = 0

    @property
    def file_name(self) -> str:
        return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in self.name) + ".json"


def parts_of(table: TablePlan, scale: Scale) -> list[Part]:
    """The parts of a table, in the order in which they are run: those that matter most come first."""
    makers = {"cloud": _cloud, "single": _single, "edge": _edge, "ablation": _ablation, "concurrency": _concurrency}
    found = [part for model in table.models for part in makers[table.name](table, scale, model)]
    return sorted(found, key=lambda part: part.rank)


# Tables ---------------------------------------------------------------------------------------------------------------


def _cloud(table: TablePlan, scale: Scale, model: str) -> list[Part]:
    systems = (
        ("ours", 1.5, ours, 0),
        ("hugging-face", 3.0, hugging_face, 0),
        ("search", 2.5, search, 1),
        ("methods", 3.0, methods, 2),
    )
    parts = [
        Part(f"{model}/{column.slug}/{name}", model, minutes, partial(rows, column=column), rank)
        for column in scale.columns
        for name, minutes, rows, rank in systems
    ]
    longest, shortest = scale.columns[1], min(scale.columns, key=lambda column: column.output)
    parts.append(Part(f"{model}/{longest.slug}/overlap", model, 2.0, partial(overlaps, column=longest), 2))
    return [*parts, Part(f"{model}/{shortest.slug}/whole-run", model, 2.0, partial(whole_run, column=shortest), 1)]


def _single(table: TablePlan, scale: Scale, model: str) -> list[Part]:
    columns = scale.contexts(2, 4, 8, 16, 32, 64, 128)
    return [Part(f"{model}/{column.slug}", model, 1.0, partial(one_request, column=column)) for column in columns]


def _edge(table: TablePlan, scale: Scale, model: str) -> list[Part]:
    rows = partial(one_request, also=(EAGER,))
    return [Part(f"{model}/{column.slug}", model, 2.0, partial(rows, column=column)) for column in scale.columns]


def _ablation(table: TablePlan, scale: Scale, model: str) -> list[Part]:
    return [
        Part(f"{model}/{column.slug}/{name}", model, 3.0, partial(ablation, column=column, ways=ways))
        for column in scale.columns[:2]
        for name, ways in (("eager", ABLATION[:3]), ("captured", ABLATION[2:]))
    ]


def _concurrency(table: TablePlan, scale: Scale, model: str) -> list[Part]:
    columns = scale.contexts(4, 16, 64)
    return [Part(f"{model}/{column.slug}", model, 3.0, partial(concurrency, column=column)) for column in columns]


# What they measure ----------------------------------------------------------------------------------------------------


def row(bench: Bench, way: Way, column: Column, requests: int | None) -> Row:
    """One of our systems with so many requests."""
    return measured(bench, way.name, way.words, column, requests, lambda: bench.ours(way, column, requests or 1))


def their_row(bench: Bench, way: Theirs, column: Column, requests: int | None) -> Row:
    """One of Hugging Face's systems with so many requests."""
    if way.cache == "offloaded" and bench.device.type != "cuda":
        return measured(bench, way.name, way.words, column, None, dict) | {"error": "its offloaded cache needs a GPU"}
    return measured(bench, way.name, way.words, column, requests, lambda: bench.theirs(way, column, requests or 1))


def their_most(bench: Bench, way: Theirs, column: Column) -> Row:
    """One of Hugging Face's systems with as many requests as serve it best, or fewer, where its growing cache outgrows memory."""
    requests = most_of_theirs(bench, way, column)
    found = their_row(bench, way, column, requests)
    while found.get("too_many") and requests and requests > 1:
        requests = max(1, int(FEWER * requests))
        found = their_row(bench, way, column, requests)
    return found


def references(bench: Bench, column: Column, requests: int | None = None) -> list[Row]:
    """Hugging Face's SDPA and our full attention, with as many requests as serve them best: in every part, on the same card."""
    theirs = their_most(bench, SDPA, column) if requests is None else their_row(bench, SDPA, column, requests)
    return [theirs, row(bench, FULL, column, requests or bench.requests_for(FULL, column))]


def one_request(bench: Bench, column: Column, also: Sequence[Theirs] = ()) -> list[Row]:
    """A single request: the references, other systems of Hugging Face, ours."""
    return [*references(bench, column, 1), *(their_row(bench, way, column, 1) for way in also), row(bench, OURS, column, 1)]


def ablation(bench: Bench, column: Column, ways: Sequence[Way]) -> list[Row]:
    """Ours piece by piece, with the requests that serve the whole best."""
    count = bench.requests_for(OURS, column)
    return [*references(bench, column), *(row(bench, way, column, count) for way in ways)]


def hugging_face(bench: Bench, column: Column) -> list[Row]:
    """Eager with the paper's requests and with the most that serve it, a static cache with a compiled step, an offloaded one."""
    paper = their_row(bench, EAGER, column, min(PAPER_EAGER_REQUESTS, bench.scale.most_requests))
    found = [*references(bench, column), paper | {"system": "hf-eager, 4 requests"}]
    for way in (EAGER, STATIC, OFFLOADED):
        here = way.cache != "offloaded" or bench.device.type == "cuda"
        found.append(their_most(bench, way, column) if here else their_row(bench, way, column, None))
    return found


def most_of_theirs(bench: Bench, way: Theirs, column: Column) -> int | None:
    """With how many requests Hugging Face is fastest; it is searched for once for all parts of a column."""
    name = f"requests of {way.name} at {column.name} of {column.prompt}, {bench.loaded.name}"
    return bench.progress.search(name, lambda: bench.most_of_theirs(way, column))


def ours(bench: Bench, column: Column) -> list[Row]:
    """Ours with the plan's choice."""
    return [*references(bench, column), row(bench, OURS, column, bench.requests_for(OURS, column))]


def search(bench: Bench, column: Column) -> list[Row]:
    """Ours with the plan's choice, and how far that is from the best of its neighbours over the whole column."""
    count, [*rows, found] = bench.requests_for(OURS, column), ours(bench, column)
    if count is None or "error" in found:
        return [*rows, found]
    prefill = found["prefill_s"] / count
    tried = {count: _rate(bench, column, count, prefill)}
    for shares in NEIGHBOURS:
        best = tried[count]
        for requests in (max(1, round(count * share)) for share in shares):
            fits = bench.away(OURS, requests, column.longest, column.longest) is not None
            if requests in tried or requests > bench.scale.most_requests or not fits:
                continue
            tried[requests] = _rate(bench, column, requests, prefill)
            if tried[requests] < best:
                break
            best = tried[requests]
    best_count = max(tried, key=lambda requests: tried[requests])
    searched = {str(requests): rate for requests, rate in sorted(tried.items())}
    choice = {"best_requests": best_count, "choice_over_best": tried[count] / tried[best_count]}
    return [*rows, found | {"searched": searched} | choice]


def _rate(bench: Bench, column: Column, requests: int, prefill: float) -> float:
    """Tokens a second of a column with so many requests of ours, whose prompts take `prefill` seconds each."""

    def step(length: int) -> float:
        [(seconds, _)] = bench.steps(OURS, column, requests, [length]).values()
        return seconds

    lengths = column.lengths(SEARCH_POINTS)
    steps = {n: bench.progress.once(f"a step of {requests} requests of {n} tokens", partial(step, n)) for n in lengths}
    return requests * column.output / (requests * prefill + column.decode_seconds(steps))


def methods(bench: Bench, column: Column) -> list[Row]:
    """Methods that choose in every layer, and ours beside them, captured and eager."""
    rows = [*references(bench, column)]
    rows += [row(bench, way, column, bench.requests_for(way, column)) for way in (QUEST, SHADOWKV)]
    count = bench.requests_for(OURS, column)
    return [*rows, row(bench, OURS, column, count), row(bench, OURS_EAGER, column, count)]


def overlaps(bench: Bench, column: Column) -> list[Row]:
    """A step of ours at the mean length by overlap, with the requests that the plan chooses for the usual one."""
    [mean] = column.lengths(1)
    at_mean = Column(column.name, mean, 0)
    count = bench.requests_for(OURS, column)
    found = references(bench, at_mean)
    for overlap in OVERLAPS:
        one = row(replace(bench, overlap=overlap), OURS, at_mean, count)
        found.append(one | {"system": f"ours, overlap {overlap:g}", "overlap": overlap})
    return found


def whole_run(bench: Bench, column: Column) -> list[Row]:
    """A column from its first token to its last in the engine as `LLM` starts it, against what steps at some lengths say."""
    count = min(bench.requests_for(OURS, column) or 1, PROVEN)
    sampled = bench.ours(OURS, column, count)
    engine = bench.engine(OURS, seats=count, longest=column.longest + 16)
    try:
        engine.warm_up()
        bench.generate(engine, [bench.prompt(column.prompt, 99)], 2, "warm-up-")
        prompts = [bench.prompt(column.prompt, 1000 + number) for number in range(count)]
        began = now(bench.device)
        bench.generate(engine, prompts, column.output)
        seconds = now(bench.device) - began
        away = len(engine.parts.kv.offloaded)
    finally:
        engine.close()
        free(bench.device)
    rate = count * column.output / seconds
    whole = {name: sampled[name] for name in ("model", "column", "prompt", "output", "requests", "words")} | {
        "system": "ours, whole run",
        "sampled": False,
        "tokens_per_s": rate,
        "seconds": seconds,
        "offloaded_layers": {str(column.longest): away},
        "sampled_over_whole": sampled["tokens_per_s"] / rate,
    }
    return [*references(bench, column), sampled, whole]


def concurrency(bench: Bench, column: Column) -> list[Row]:
    """Full and ours by the requests that there are at once; those that the plan does not run wait."""
    found = []
    for way in (FULL, OURS):
        known: dict[int, Row] = {}
        for requests in bench.scale.concurrency:
            running = bench.requests_for(way, column, requests)
            if running is not None and running not in known:
                known[running] = row(bench, way, column, running)
            one = row(bench, way, column, None) if running is None else known[running]
            found.append(one | {"concurrency": requests})
    return found
