"""Drift of features in long sparse decoding.

The head's features come from forward passes whose attention was sparse, and the KV of every generated token was made by such
passes too. So a sequence is generated with the head's selections, and then the very same tokens are run densely: how far apart
are the features, and would the head have chosen otherwise?
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext.core import Batch, Selection
from specontext.distill.attention import head_log_weights
from specontext.distill.data import Source
from specontext.distill.data.on_policy import prompt_length
from specontext.distill.queries import candidates, scored
from specontext.distill.recall import keep
from specontext.distill.target import Observation, Target
from specontext.engine.llm import LLM
from specontext.evaluation.analysis.rows import Row, row
from specontext.evaluation.analysis.settings import AnalysisError
from specontext.retrieval.selector import AheadSelector, LaneTokens
from specontext.sampling_params import SamplingParams

BIN = 32  # generated tokens of one point
PROMPTS = 4
PROGRAM_LENGTH = 1024  # longest problem that the program task fills
LEAST_BUDGET = 64
SHARE = 16  # the budget is 1/16 of the context


@dataclass
class Record:
    """What a selector saw and said while one request ran.

    Attributes:
        features: by position, [F * H]; none of a method that taps none.
        scored: by position, the tokens that each group scored, bool [G, S].
    """

    features: dict[int, Tensor] = field(default_factory=dict)
    scored: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recorded(selector: AheadSelector) -> Iterator[Record]:
    """Record the steps of a selector that serves one request."""
    record = Record()
    select, observe = selector.select, selector.observe

    def selecting(lane: LaneTokens) -> Selection:
        selection = select(lane)
        [position] = lane.positions.tolist()
        tokens = torch.where(selection.scored[0], selection.tokens[0], position + 1)  # [G, B]
        mask = torch.zeros((len(tokens), position + 2), dtype=torch.bool, device=tokens.device)
        record.scored[position] = mask.scatter_(-1, tokens, True)[:, : position + 1]
        return selection

    def observing(batch: Batch, features: Tensor | None) -> None:
        observe(batch, features)
        if features is not None:
            record.features |= dict(zip(batch.positions.tolist(), features.clone(), strict=True))

    selector.select, selector.observe = selecting, observing  # type: ignore[method-assign]
    try:
        yield record
    finally:
        del selector.select, selector.observe  # the class's own again


@dataclass
class Drift:
    """Sums over generated tokens in bins of `BIN`.

    Attributes:
        distance: 1 - cosine of sparse and dense features, mean over the feature layers.
        agreement: share of the scored tokens that the head would also score from dense features.
        ends: generated tokens at the end of each bin.
    """

    distance: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    scoring: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def add(self, bin: int, end: int, distance: Tensor, agreement: Tensor) -> None:
        """Add the tokens of a bin: distances [T] and shares [T'] of the tokens that scored anything."""
        while len(self.ends) <= bin:
            for sums in (self.distance, self.agreement, self.tokens, self.scoring, self.ends):
                sums.append(0)
        self.distance[bin] += float(distance.double().sum())
        self.agreement[bin] += float(agreement.double().sum())
        self.tokens[bin] += len(distance)
        self.scoring[bin] += len(agreement)
        self.ends[bin] = max(self.ends[bin], end)

    def rows(self, *, variant: str, map: str, budget: int) -> list[Row]:
        found = []
        for what, sums, counts in (
            ("feature_drift", self.distance, self.tokens),
            ("feature_drift_selection", self.agreement, self.scoring),
        ):
            found += [
                row(what, "speculative", total / count, granularity="head", variant=variant, map=map, budget=budget, length=end)
                for total, count, end in zip(sums, counts, self.ends, strict=True)
                if count
            ]
        return found


def draw_prompts(source: Source, length: int, count: int, seed: int) -> list[list[int]]:
    """Beginnings of sequences: all before the first answer, of running text between a quarter and three quarters."""
    prompts = []
    for step in range(count):
        given = source.draw(step, length, 1)
        prompts.append(given.ids[0, : prompt_length(given, 0, random.Random(f"drift/{seed}/{step}"))].tolist())
    return prompts


def drift_budget(prompts: Sequence[Sequence[int]], new_tokens: int, always: int) -> int:
    """1/16 of the longest context, and at least 64 and one more than sinks and recent tokens."""
    return max(LEAST_BUDGET, (max(map(len, prompts)) + new_tokens) // SHARE, always + 1)


def measure_drift(
    llm: LLM, prompts: Sequence[Sequence[int]], new_tokens: int, *, tick: Callable[[], None] = lambda: None
) -> Drift:
    """Generate greedily after each prompt, then run the same tokens densely.

    Args:
        llm: of method 'speculative', at head level, with a head that reads features.
        new_tokens: generated after each prompt, end tokens ignored; at least 2.
        tick: called after each prompt.

    Raises:
        AnalysisError: an engine whose head reads no features, or one that may capture its steps.
        RequestError: prompt and new tokens are longer than the engine's longest context.
    """
    head, method = llm.engine.parts.head, llm.config
    if head is None or head.config.variant != "features" or method.granularity != "head":
        raise AnalysisError("drift is measured on an engine of method speculative at head level, with a head that reads features")
    if llm.engine.runner.captures:
        raise AnalysisError("drift looks into every step, and captured ones cannot be seen: start the engine with enforce_eager")
    assert method.budget is not None
    target = Target(llm.engine.loaded.model, head.config.feature_layers)
    drift = Drift()
    for prompt in prompts:
        selector = llm.engine.parts.selector
        assert isinstance(selector, AheadSelector)
        with recorded(selector) as record:
            params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
            [output] = llm.generate(list(prompt), params)
        ids = torch.tensor([[*prompt, *output.token_ids]], device=target.device)
        with torch.no_grad():
            seen = target.observe(ids)
        dense = seen.features[0]
        for start in range(0, len(output.token_ids) - 1, BIN):
            end = min(start + BIN, len(output.token_ids) - 1)
            places = range(len(prompt) + start, len(prompt) + end)
            sparse = torch.stack([record.features[place] for place in places])
            distance = feature_distance(sparse, dense[places.start : places.stop], len(head.config.feature_layers))
            rows = torch.arange(places.start, places.stop, device=target.device)[None]
            ids, embeddings, features, hidden = (
                part[:, : places.stop] for part in (seen.ids, seen.embeddings, seen.features, seen.hidden)
            )
            until = Observation(ids, embeddings, features, hidden)
            far, always = candidates(rows, places.stop, method.sink, method.recent)
            with torch.no_grad():
                weights = head_log_weights(head, until, rows, far).exp()
            chosen = (keep(weights, far, always, scored(method.budget, method.sink, method.recent)) & far)[0]  # [G, T, S]
            shares = [agreement(record.scored[place], chosen[:, i, : place + 1]) for i, place in enumerate(places)]
            drift.add(start // BIN, end, distance, torch.tensor([share for share in shares if share is not None]))
        tick()
    return drift


def feature_distance(sparse: Tensor, dense: Tensor, layers: int) -> Tensor:
    """1 - cosine of features [T, F * H], mean over the F layers: float32 [T]."""
    pairs = [features.float().unflatten(-1, (layers, -1)) for features in (sparse, dense)]
    return (1 - F.cosine_similarity(pairs[0], pairs[1], dim=-1)).mean(-1)


def agreement(mine: Tensor, theirs: Tensor) -> float | None:
    """Share of the tokens of `mine` bool [G, S] that `theirs` has too; None where there are none."""
    total = int(mine.sum())
    return int((mine & theirs).sum()) / total if total else None
