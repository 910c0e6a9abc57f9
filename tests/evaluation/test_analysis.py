"""The analysis of a retrieval head: its rows agree with the engine, with definitions and with what must hold of any head."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext import LLM, SamplingParams, SpeContextError
from specontext.config import GRANULARITIES
from specontext.distill.data import DataError
from specontext.distill.data.source import Sequences
from specontext.distill.target import Target
from specontext.evaluation.analysis import plots
from specontext.evaluation.analysis.drift import draw_prompts, drift_budget, measure_drift, recorded
from specontext.evaluation.analysis.entrants import CUT, feature_layers, load_heads, make_entrants
from specontext.evaluation.analysis.files import FILE, write_analysis
from specontext.evaluation.analysis.lengths import standard_lengths, yarn_states
from specontext.evaluation.analysis.overlap import overlap, overlap_rows
from specontext.evaluation.analysis.recall import ORACLE, Judged, judge
from specontext.evaluation.analysis.report import Analysis, scrub
from specontext.evaluation.analysis.rows import KEYS, METHODS, Row, find, recall_targets, row, value_of
from specontext.evaluation.analysis.selection import Entrant, Kind, identity_map, look, selections
from specontext.evaluation.analysis.settings import AnalysisError, Settings
from specontext.evaluation.analysis.texts import Sample, draw_samples, fitting_length
from specontext.retrieval.checkpoint import load_head
from specontext.retrieval.head import HeadConfig, RetrievalHead

LENGTH, SINK, RECENT = 96, 2, 4
BUDGETS = (12, 24, 48)
SETTINGS = Settings("head", "model", ("tasks",), queries=12, sequences=2, sink=SINK, recent=RECENT)


class Texts:
    """Random tokens; every sequence has `tokens` of the asked length, the positions from `first_wanted` on are wanted."""

    def __init__(self, tokens: int, first_wanted: int = 0) -> None:
        self.tokens, self.first_wanted = tokens, first_wanted

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        ids = torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(step))
        tokens = min(self.tokens, length)
        place = torch.arange(length)
        wanted = (place >= self.first_wanted) & (place < tokens - 1)
        return Sequences(ids, torch.full((rows,), tokens), wanted.expand(rows, -1))


Parts = tuple[Target, list[Entrant], list[Sample]]


@pytest.fixture(scope="module")
def parts(make_llm: Callable[..., LLM], checkpoint: Callable[[str], Path]) -> Callable[[str], Parts]:
    """parts(family): target, its head and the head without features, two sequences."""

    def made(family: str) -> Parts:
        loaded = make_llm(family, "full").engine.loaded
        settings = replace(SETTINGS, head=str(checkpoint(family)))
        heads = load_heads(settings, loaded.shape, torch.device("cpu"))
        target = Target(loaded.model, feature_layers(heads))
        samples = draw_samples(Texts(LENGTH), LENGTH, 2)
        return target, make_entrants(heads, target, samples, length=LENGTH, budget=24, settings=settings), samples

    return made


@pytest.fixture(scope="module")
def equal_heads(parts: Callable[[str], Parts]) -> tuple[Parts, Judged]:
    """A model with one query head for each KV head, where the layers' own best tokens have the greatest recall there is."""
    target, entrants, samples = parts("qwen2")
    return (target, entrants, samples), judge(target, entrants, samples, BUDGETS, SETTINGS)


@pytest.fixture(scope="module")
def report(checkpoint: Callable[[str], Path]) -> dict[str, Any]:
    """A whole analysis of a tiny random model."""
    folder = str(checkpoint("llama"))
    settings = Settings(
        folder,
        folder,
        ("tasks",),
        length=256,
        budgets=(32, 64, 300),
        queries=8,
        sequences=2,
        lengths=(256, 512),
        calibration_sequences=1,
        drift_tokens=20,
    )
    return Analysis(settings).run()


# What a whole analysis gives -------------------------------------------------------------------------------------------


def test_every_row_has_the_ten_keys(report: dict[str, Any]) -> None:
    for one in report["rows"]:
        assert tuple(one) == KEYS and one["method"] in METHODS
        highest = math.inf if one["what"] in ("kl_divergence", "perplexity_ratio") else 1 + 1e-6
        assert isinstance(one["value"], float) and -1e-6 <= one["value"] <= highest
    keys = [tuple(value for key, value in one.items() if key != "value") for one in report["rows"]]
    assert len(set(keys)) == len(keys)


def test_every_subject_is_there(report: dict[str, Any]) -> None:
    rows = report["rows"]
    assert {one["budget"] for one in find(rows, what="recall")} == {32, 64} and report["budgets_left_out"] == [300]
    for budget in (32, 64):
        for what in ("recall", "hit_rate"):
            made = {
                (r["method"], r["granularity"], r["variant"], r["map"]) for r in find(rows, what=what, budget=budget, layer=None)
            }
            for variant in ("features", CUT):
                assert made >= {("speculative", "head", variant, name) for name in ("identity", "calibrated")}
                assert made >= {("speculative", level, variant, None) for level in ("union", "batch")}
            assert made >= {("oracle", "head", None, None), ("streaming", None, None, None), ("random", "head", None, None)}
            assert made >= {("shared_oracle", level, None, None) for level in GRANULARITIES}
        overlaps = {(r["method"], r["granularity"], r["variant"]) for r in find(rows, what="overlap", budget=budget)}
        assert overlaps >= {("speculative", level, "features") for level in GRANULARITIES}
        assert overlaps >= {("oracle", "head", None), ("shared_oracle", "head", None)}
    heat = [r for r in rows if r["layer"] is not None]
    assert {r["method"] for r in heat} == {"speculative", "shared_oracle", "oracle"} and {r["budget"] for r in heat} == {32}
    assert {(r["layer"], r["head"]) for r in heat} == {(layer, head) for layer in range(3) for head in range(2)}
    for one in ("no_yarn", "default"):
        curve = find(rows, what=f"recall_vs_length:{one}")
        assert {(r["length"], r["budget"]) for r in curve} == {(256, 32), (512, 64), (512, 32)}  # 16 of 256 is too little
    assert {r["method"] for r in find(rows, what="recall_vs_length")} == {"oracle", "shared_oracle", "streaming"}
    assert [r["length"] for r in find(rows, what="feature_drift")] == [19]
    assert [r["length"] for r in find(rows, what="feature_drift_selection")] == [19]
    assert 0 < report["targets"]["of_shared_oracle"] <= 1.01


def test_the_mean_over_layers_and_heads_is_the_rows_mean(report: dict[str, Any]) -> None:
    for method in ("shared_oracle", "oracle"):
        rows = find(report["rows"], what="recall", method=method, granularity="head", budget=32, length=256)
        cells = [one["value"] for one in rows if one["layer"] is not None]
        assert value_of(rows, layer=None) == pytest.approx(sum(cells) / len(cells))


def test_the_report_can_be_stored_and_names_no_path(
    report: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    files = write_analysis(report, tmp_path / "out" / "made")
    assert [file.name for file in files] == [FILE, *plots.PLOTS]
    text = files[0].read_text()
    assert json.loads(text)["rows"] == report["rows"]
    assert json.loads(text)["command"].startswith(f"specontext head analyze {checkpoint('llama').name} --target")
    assert str(checkpoint("llama").parent) not in text and '"/' not in text
    for plot in files[1:]:
        assert plot.read_bytes()[:4] == b"\x89PNG" and plot.stat().st_size < 150_000
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["made"]


# Selections ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "granularity"), [*(("speculative", g) for g in GRANULARITIES), ("random", "head")])
def test_selections_are_the_engines_own(
    make_llm: Callable[..., LLM], prompts: Any, checkpoint: Callable[[str], Path], method: str, granularity: str
) -> None:
    llm = make_llm("llama", method, budget=16, granularity=granularity)
    prompt = prompts[2]
    with recorded(llm.engine.parts.selector) as record:
        [output] = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, seed=5))
    [(position, scored)] = record.scored.items()
    assert position == len(prompt)
    loaded = llm.engine.loaded
    head = load_head(checkpoint("llama"), target=loaded.shape)
    target = Target(loaded.model, head.config.feature_layers)
    entrant = Entrant("features", head, {"identity": identity_map(target)}, yarn_factor=head.config.yarn_factor(512))
    ids, rows = torch.tensor([[*prompt, output.token_ids[0]]]), torch.tensor([[position]])
    view = look(target, ids, rows, torch.ones_like(rows, dtype=torch.bool), [entrant], sink=2, recent=4)
    masks = {kind: mask for kind, mask, _ in selections(view, [entrant], 16, sink=2, recent=4, seed=5)}
    kind = Kind("random", "head") if method == "random" else next(k for k in masks if k.variant and k.granularity == granularity)
    assert torch.equal((masks[kind] & view.far)[0, :, 0], scored)


def test_no_selection_reads_more_than_the_budget(equal_heads: tuple[Parts, Judged]) -> None:
    (target, entrants, samples), _ = equal_heads
    rows = torch.tensor([[95, 80, 30, 10]])
    view = look(target, samples[0].ids, rows, rows > 0, entrants, sink=SINK, recent=RECENT)
    for budget in BUDGETS:
        for kind, mask, _ in selections(view, entrants, budget, sink=SINK, recent=RECENT, seed=0):
            assert (mask.sum(-1) == torch.minimum(rows + 1, torch.tensor(budget))[:, None]).all(), kind
            assert (mask & view.always).sum() == view.always.expand_as(mask).sum()
    assert Kind("speculative", "union", CUT) in {kind for kind, *_ in selections(view, entrants, 12, sink=2, recent=4, seed=0)}


# Recall, hit rate ------------------------------------------------------------------------------------------------------


def test_nothing_is_better_than_the_layers_own_best_tokens(equal_heads: tuple[Parts, Judged]) -> None:
    rows = equal_heads[1].rows(LENGTH)
    for budget in BUDGETS:
        best = value_of(rows, method="oracle", budget=budget)
        assert best is not None and all(one["value"] <= best + 1e-6 for one in find(rows, budget=budget))
        shared = value_of(rows, method="shared_oracle", granularity="head", budget=budget)
        chance = value_of(rows, method="random", budget=budget)
        assert shared is not None and chance is not None and shared > chance + 0.02
    for method in ("oracle", "shared_oracle"):
        curve = [value_of(rows, method=method, granularity="head", budget=budget) for budget in BUDGETS]
        assert curve == sorted(curve)


def test_hit_rates_are_shares_and_the_oracles_is_one(equal_heads: tuple[Parts, Judged]) -> None:
    rows = equal_heads[1].hit_rows(LENGTH)
    assert {one["value"] for one in find(rows, method="oracle")} == {1.0}
    assert all(0 <= one["value"] <= 1 for one in rows)
    assert value_of(rows, method="shared_oracle", granularity="head", budget=12) > value_of(rows, method="random", budget=12)  # type: ignore[operator]


def test_a_calibrated_map_is_not_worse_on_what_it_was_calibrated_on(equal_heads: tuple[Parts, Judged]) -> None:
    rows = equal_heads[1].rows(LENGTH)
    for variant in ("features", CUT):
        at = {"variant": variant, "granularity": "head", "budget": 24}
        assert value_of(rows, map="calibrated", **at) >= value_of(rows, map="identity", **at) - 1e-6  # type: ignore[operator]


def test_everything_is_one_when_the_budget_holds_the_context(parts: Callable[[str], Parts]) -> None:
    target, entrants, samples = parts("llama")
    judged = judge(target, entrants, samples, (LENGTH, 2 * LENGTH), SETTINGS)
    for one in judged.rows(LENGTH) + judged.hit_rows(LENGTH):
        assert one["value"] == pytest.approx(1, abs=1e-5)


def test_budgets_judged_one_by_one_give_the_same(equal_heads: tuple[Parts, Judged], monkeypatch: pytest.MonkeyPatch) -> None:
    (target, entrants, samples), together = equal_heads
    monkeypatch.setattr("specontext.evaluation.analysis.recall.MASK_BYTES", 1)
    alone = judge(target, entrants, samples, BUDGETS, SETTINGS)
    assert alone.rows(LENGTH) == together.rows(LENGTH) and alone.hit_rows(LENGTH) == together.hit_rows(LENGTH)
    assert alone.queries == 2 * SETTINGS.queries and ORACLE in {kind for kind, _ in alone.names.values()}


# Heads -----------------------------------------------------------------------------------------------------------------


def test_heads_with_other_group_counts_have_no_identity_map(parts: Callable[[str], Parts]) -> None:
    target, entrants, samples = parts("qwen3")
    assert list(entrants[0].maps) == ["own", "calibrated"] and entrants[0].standard_map == "own"
    rows = judge(target, entrants, samples, (24,), SETTINGS).rows(LENGTH)
    assert {one["map"] for one in find(rows, method="speculative", granularity="head")} == {"own", "calibrated"}
    heads = {"features": RetrievalHead(replace(entrants[0].head.config, head_map=None))}
    with pytest.raises(AnalysisError, match="calibration-sequences"):
        make_entrants(heads, target, [], length=LENGTH, budget=24, settings=SETTINGS)


def test_labels_of_several_heads(checkpoint: Callable[[str], Path], make_llm: Callable[..., LLM]) -> None:
    shape, folder = make_llm("llama", "full").shape, checkpoint("llama") / "retrieval_head"
    settings = replace(SETTINGS, head=str(folder), compare=(str(folder), str(folder)))
    heads = load_heads(settings, shape, torch.device("cpu"))
    assert list(heads) == ["features", "features:retrieval_head", "features:retrieval_head-2", CUT]
    embedding = load_heads(
        replace(SETTINGS, head=str(checkpoint("mistral"))), make_llm("mistral", "full").shape, torch.device("cpu")
    )
    assert list(embedding) == ["embedding"]


def test_heads_with_other_feature_layers_get_their_own(parts: Callable[[str], Parts]) -> None:
    target, entrants, samples = parts("qwen2")
    assert target.feature_layers == (1, 3) and entrants[0].head.config.feature_layers == (3, 1)
    rows = torch.tensor([[90, 60]])
    both = look(target, samples[0].ids, rows, rows > 0, entrants[:1], sink=SINK, recent=RECENT)
    alone = look(Target(target.model, (3, 1)), samples[0].ids, rows, rows > 0, entrants[:1], sink=SINK, recent=RECENT)
    torch.testing.assert_close(both.weights["features"], alone.weights["features"])


# Overlap ---------------------------------------------------------------------------------------------------------------


def kept(*tokens: Sequence[int]) -> Tensor:
    """[1, groups, 1, 12] of the tokens of each group."""
    mask = torch.zeros(1, len(tokens), 1, 12, dtype=torch.bool)
    for group, places in enumerate(tokens):
        mask[0, group, 0, list(places)] = True
    return mask


def test_overlap_counts_scored_tokens_only() -> None:
    far = kept(range(2, 9))
    share, counts = overlap(kept([0, 1, 2, 3, 4, 9], [0, 5, 6, 7]), kept([0, 1, 3, 4, 8, 9], [0, 5, 2, 3]), far, far)
    assert share.item() == pytest.approx(3 / 6) and counts.item()  # 3, 4 of {3, 4, 8} and 5 of {5, 2, 3}
    assert not overlap(kept([0, 1]), kept([0, 4]), far, far)[1].item()
    assert not overlap(kept([0, 4]), kept([0, 1]), far, far)[1].item()


def test_overlap_of_a_window_and_of_chance(equal_heads: tuple[Parts, Judged]) -> None:
    (target, entrants, samples), _ = equal_heads
    rows = overlap_rows(target, entrants, samples, BUDGETS, LENGTH, SETTINGS)
    for budget in BUDGETS:
        scored = budget - SINK - RECENT
        assert value_of(rows, method="streaming", budget=budget) == pytest.approx((scored - 1) / scored)
        assert value_of(rows, method="random", budget=budget) < 0.8  # type: ignore[operator]
    assert {one["what"] for one in rows} == {"overlap"} and all(one["map"] is None for one in rows)


# Lengths ---------------------------------------------------------------------------------------------------------------


def test_yarn_states_and_lengths() -> None:
    config = HeadConfig("embedding", 8, 8, 10, 2, 2, 4, trained_length=1024)
    assert yarn_states(config, 512, 4096) == {"no_yarn": 1.0, "yarn": 4.0, "default": 1.0}
    assert yarn_states(config, 2048, 4096) == {"no_yarn": 1.0, "yarn": 4.0, "default": 2.0}
    assert yarn_states(config, 512, 1024) == {"no_yarn": 1.0, "default": 1.0}
    own = replace(config, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert yarn_states(own, 4096, 4096) == {"default": 1.0}
    assert standard_lengths(config, 4096, 20) == (512, 1024, 2048, 4096)
    assert standard_lengths(replace(config, trained_length=1100), 5000, 20) == (512, 1100, 2200, 4096)
    assert standard_lengths(config, 600, 20) == (512,) and standard_lengths(config, 600, 64) == ()


# Drift -----------------------------------------------------------------------------------------------------------------


def test_features_do_not_drift_when_everything_is_read(make_llm: Callable[..., LLM], prompts: Any) -> None:
    llm = make_llm("llama", "speculative", budget=160, max_num_seqs=1)
    selector = llm.engine.parts.selector
    drift = measure_drift(llm, prompts[1:3], 50)
    assert drift.ends == [32, 49] and drift.tokens == drift.scoring == [64, 34]
    assert all(abs(total / count) < 1e-5 for total, count in zip(drift.distance, drift.tokens, strict=True))
    assert drift.agreement == drift.scoring
    assert "select" not in vars(selector) and "observe" not in vars(selector)


def test_features_drift_when_little_is_read(make_llm: Callable[..., LLM], prompts: Any) -> None:
    drift = measure_drift(make_llm("llama", "speculative", budget=10, max_num_seqs=1), prompts[2:3], 40)
    rows = drift.rows(variant="features", map="identity", budget=10)
    assert [(one["what"], one["length"]) for one in rows[:2]] == [("feature_drift", 32), ("feature_drift", 39)]
    assert all(tuple(one) == KEYS for one in rows) and len(rows) == 4
    assert all(one["value"] > 1e-4 for one in rows[:2]) and all(0 <= one["value"] < 1 for one in rows[2:])


def test_drift_needs_features(make_llm: Callable[..., LLM], prompts: Any) -> None:
    for llm in (
        make_llm("mistral", budget=16),
        make_llm("llama", "streaming", budget=16),
        make_llm(budget=16, granularity="batch"),
    ):
        with pytest.raises(AnalysisError, match="reads features"):
            measure_drift(llm, prompts[:1], 4)


def test_prompts_end_where_the_first_answer_begins() -> None:
    assert [len(prompt) for prompt in draw_prompts(Texts(LENGTH, first_wanted=40), LENGTH, 2, seed=0)] == [41, 41]
    assert all(LENGTH / 4 - 1 <= len(prompt) <= 3 * LENGTH / 4 for prompt in draw_prompts(Texts(LENGTH), LENGTH, 5, seed=0))
    assert (
        drift_budget([[0] * 1000, [0]], 600, 20) == 100
        and drift_budget([[0]], 100, 20) == 64
        and drift_budget([[0]], 9, 80) == 81
    )


# Texts -----------------------------------------------------------------------------------------------------------------


def test_samples_are_filled_and_asked_at_their_end() -> None:
    for sample in draw_samples(Texts(90), LENGTH, 3):
        assert sample.tokens == 90 and sample.wanted.nonzero()[:, 1].tolist() == list(range(68, 89))
    assert fitting_length(Texts(60), (256, 128, 64, 32)) == 64


@pytest.mark.parametrize(
    ("source", "says"),
    [(Texts(50), "longest has 50: lower the length"), (Texts(LENGTH, first_wanted=94), "last quarter")],
)
def test_texts_that_cannot_be_measured(source: Texts, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        draw_samples(source, LENGTH, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"texts": ()}, "--text"),
        ({"budgets": (64, 20)}, "must exceed sink"),
        ({"budgets": ()}, "--budgets"),
        ({"lengths": (128,), "recent": 16}, "too short"),
        ({"length": 5}, "at least"),
        ({"sink": 0}, "sink must be at least 1"),
        ({"drift_tokens": 1}, "drift_tokens must be at least 2"),
        ({"calibration_sequences": -1}, "calibration_sequences"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(AnalysisError, match=says):
        replace(Settings("head", "model", ("tasks",)), **changes)


def test_lengths_beyond_the_model_and_budgets_beyond_the_length() -> None:
    with pytest.raises(AnalysisError, match="--length 4096 exceeds the model's maximum of 512"):
        replace(SETTINGS, length=4096).check_lengths(512)
    with pytest.raises(AnalysisError, match="--lengths 1024 exceeds"):
        replace(SETTINGS, lengths=(256, 1024)).check_lengths(512)
    with pytest.raises(AnalysisError, match="no budget is left"):
        replace(SETTINGS, budgets=(512,)).budgets_for(256)
    assert SETTINGS.budgets_for(200) == (32, 64, 128)


# Numbers and plots -----------------------------------------------------------------------------------------------------


def some_rows(what: str, length: int, budget: int, **values: float) -> list[Row]:
    at: dict[str, Any] = {"length": length, "budget": budget}
    rows = [row(what, "speculative", values["own"], granularity="head", variant="features", map="own", **at)]
    rows.append(row(what, "speculative", values["identity"], granularity="head", variant="features", map="identity", **at))
    rows.append(row(what, "speculative", 0.9, granularity="head", variant="embedding", map="identity", **at))
    return [*rows, *(row(what, m, values.get(m, 0.5), granularity="head", **at) for m in ("shared_oracle", "oracle"))]


def test_recall_targets() -> None:
    rows = some_rows("recall", 800, 100, own=0.6, identity=0.3, shared_oracle=0.8, oracle=0.9)
    rows += some_rows("recall_vs_length:default", 400, 50, own=0.5, identity=0.1)
    rows += some_rows("recall_vs_length:default", 800, 100, own=0.4, identity=0.1)
    found = recall_targets(rows, 800, 100, trained_length=400)
    assert found == pytest.approx({"of_shared_oracle": 0.75, "of_oracle": 0.6 / 0.9, "beyond_trained": 0.8})
    assert recall_targets(rows, 800, 64) == {"of_shared_oracle": None, "of_oracle": None, "beyond_trained": None}
    assert recall_targets(rows, 800, 100, trained_length=300)["beyond_trained"] is None


def test_absolute_paths_are_left_out() -> None:
    assert scrub("from nano on /data/my/text.jsonl, ~/x/y.txt, tasks and a/b") == "from nano on text.jsonl, y.txt, tasks and a/b"


def test_plots_are_drawn_from_the_file_alone(report: dict[str, Any], tmp_path: Path) -> None:
    [file, *_] = write_analysis(report, tmp_path / "made")
    drawn = plots.redraw(file, tmp_path / "again")
    assert [path.name for path in drawn] == list(plots.PLOTS) and all(path.stat().st_size > 5000 for path in drawn)
    assert len(plots.draw_plots(report | {"rows": find(report["rows"], what="overlap")}, tmp_path / "few")) == 1
    with pytest.raises(plots.PlotError, match="not an analysis"):
        plots.redraw(tmp_path / "made" / "overlap_vs_budget.png", tmp_path)


def test_missing_matplotlib_is_said(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SpeContextError, match=r"pip install .*\[plots\]"):
        write_analysis(report, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_a_newer_analysis_takes_the_place_of_an_older_one(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    write_analysis(report, tmp_path)
    write_analysis(report | {"rows": find(report["rows"], what="overlap")}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"note.txt", FILE, "overlap_vs_budget.png"}
    with pytest.raises(AnalysisError, match="is a file"):
        write_analysis(report, tmp_path / "note.txt")
