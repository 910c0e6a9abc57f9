"""WHAT the heads read: one prompt, and for each generated token what every KV head read beside its true attention.

The engine itself runs; an observer looks at its layers. The record is compact, since a report carries it whole:

    format, model, head, method, budget, sink, recent
    prompt_tokens     tokens of the prompt; the others in `texts` were generated
    texts             what each token says
    layers            numbers of the recorded layers
    readers           [layers][KV heads], the retrieval group whose set a KV head reads; null for a method without sets
    steps             one for each generated token but the last:
      length          tokens in context; the token that is processed is the last of them
      sets            distinct token sets, each ascending, as gaps: the first position + 1, then differences
      heads           [layers][KV heads]:
        set           place in `sets`, -1 where everything was read
        recall        share of the true attention that lies on what was read
        top, mass     positions with the most true attention, most first, and that attention in units of 1/10000

True attention is the softmax of a layer's own logits over the whole context, mean over the query heads of a KV head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from specontext.core import Choice, RequestOutput
from specontext.engine.llm import LLM
from specontext.errors import SpeContextError
from specontext.evaluation.analysis.settings import shown
from specontext.retrieval.registry import needs_head
from specontext.retrieval.selector import LaneTokens, LayerSelector, reads_everything
from specontext.sampling_params import SamplingParams

FORMAT = 1
FILE = "selections.json"
KEYS = {"model", "head", "method", "budget", "sink", "recent", "prompt_tokens", "texts", "layers", "readers", "steps"}
STEP_KEYS = {"length", "sets", "heads"}
TOP = 64  # entries of true attention that are kept for each head
UNITS = 10_000
LEAST = 0.0005  # attention that is shown at all
MOST_NUMBERS = 700_000  # of a record; some 2.5 MB
CONTEXT = 4  # tokens before a token with which it is decoded


class SelectionError(SpeContextError, ValueError):
    """Selections that cannot be recorded as asked; the message says what would work."""


@dataclass
class Recorder:
    """Observes the layers of an engine that serves one request.

    Attributes:
        layers: that are recorded.
        steps: what was seen, as in the record.
    """

    layers: Sequence[int]
    kv_heads: int
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, layer: int, decode: LaneTokens, weights: Tensor, tokens: Tensor | None) -> None:
        """See one layer of a step.

        Args:
            weights: true attention, float32 [1, Hq, S].
            tokens: positions that each KV head reads, int64 [1, Hkv, B], negative for none; None where all are read.
        """
        if layer not in self.layers:
            return
        assert len(decode.positions) == 1, "selections are recorded of one request"
        length = int(decode.lengths[0])
        if not self.steps or self.steps[-1]["length"] != length:
            self.steps.append({"length": length, "sets": [], "heads": []})
        step = self.steps[-1]
        grouped = weights[0, :, :length].unflatten(0, (self.kv_heads, -1)).mean(1)  # [Hkv, S]
        read = [None] * self.kv_heads if tokens is None else [one[one >= 0].sort().values for one in tokens[0]]
        step["heads"].append([_head(step["sets"], *pair) for pair in zip(grouped, read, strict=True)])


def _head(sets: list[list[int]], weights: Tensor, read: Tensor | None) -> dict[str, Any]:
    """One KV head of a step; its set is added to `sets` unless it is there.

    Args:
        weights: [S]; read: positions, ascending.
    """
    place, recall = -1, 1.0
    if read is not None:
        positions = read.tolist()
        gaps = [after - before for before, after in zip([-1, *positions], positions, strict=False)]
        if gaps not in sets:
            sets.append(gaps)
        place, recall = sets.index(gaps), float(weights[read].sum())
    top = weights.topk(min(TOP, len(weights)))
    most = [(at, share) for share, at in zip(top.values.tolist(), top.indices.tolist(), strict=True) if share >= LEAST]
    mass = [round(UNITS * share) for _, share in most]
    return {"set": place, "recall": round(recall, 4), "top": [at for at, _ in most], "mass": mass}


def record_selections(
    llm: LLM,
    prompt: str | Sequence[int],
    *,
    tokens: int = 32,
    method: str | None = None,
    budget: int | None = None,
    ignore_eos: bool = False,
) -> dict[str, Any]:
    """Generate greedily and record what is read; see this module for what comes back.

    Args:
        llm: with `measure_recall=True`, since true attention has to be computed.
        tokens: steps to record at most.
        method, budget: as in `SamplingParams`; None is the engine's own.
        ignore_eos: go on after the model's end token.

    Raises:
        SelectionError: the engine computes no true attention, the output ended before anything was read, or the record would
            be larger than a report can carry.
    """
    engine, shape = llm.engine, llm.shape
    if not engine.config.measure_recall:
        raise SelectionError("true attention is needed beside the selections: start the engine with measure_recall=True")
    if tokens < 1:
        raise SelectionError(f"at least one step has to be recorded, got {tokens}")
    choice = engine.parts.methods.choose(method, budget) or engine.parts.methods.own
    layers = _layers(llm, choice, tokens)
    recorder = Recorder(layers, shape.kv_heads)
    engine.runner.observer = recorder
    try:
        params = SamplingParams(temperature=0.0, max_tokens=tokens + 1, method=method, budget=budget, ignore_eos=ignore_eos)
        [output] = llm.generate(prompt if isinstance(prompt, str) else [list(prompt)], params, progress=True)
    finally:
        engine.runner.observer = None
    if not recorder.steps:
        raise SelectionError(
            f"the output ended after {len(output.token_ids)} token, so nothing was read step by step: give another prompt, or go "
            "on after the end token with ignore_eos (--ignore-eos)"
        )
    return _record(llm, choice, layers, recorder, output)


def _layers(llm: LLM, choice: Choice, tokens: int) -> list[int]:
    """As many layers, evenly spread, as a record may hold; small models have room for all."""
    shape, selector = llm.shape, llm.engine.parts.methods.of(choice)
    read = (choice.budget + tokens) * selector.groups
    in_layer = isinstance(selector, LayerSelector)
    each = tokens * (shape.kv_heads * 2 * TOP + (read if in_layer else 0))
    shared = 0 if in_layer else tokens * read
    count = min(shape.layers, (MOST_NUMBERS - shared) // each)
    if count < 1:
        # One layer takes tokens * (grow * tokens + once) numbers.
        grow, once = selector.groups, choice.budget * selector.groups + shape.kv_heads * 2 * TOP
        fit = int((math.sqrt(once**2 + 4 * grow * MOST_NUMBERS) - once) / (2 * grow))
        raise SelectionError(
            f"{tokens} steps of {choice.method} with budget {choice.budget} would make a record too large to look at: record "
            f"fewer tokens, {max(1, fit):,} at most"
        )
    spread = (shape.layers - 1) / max(count - 1, 1)
    return [round(number * spread) for number in range(count)]


def _record(llm: LLM, choice: Choice, layers: list[int], recorder: Recorder, output: RequestOutput) -> dict[str, Any]:
    methods, engine = llm.engine.parts.methods, llm.engine
    head = engine.config.retrieval_head if needs_head(choice.method) else None
    dense = reads_everything(methods.of(choice))
    read_by = methods.reader(choice).head_map.tolist()
    ids = [*output.prompt_token_ids, *output.token_ids]
    return {
        "format": FORMAT,
        "model": shown(engine.loaded.name),
        "head": None if head in (None, "auto") else shown(head),
        "method": choice.method,
        "budget": choice.budget or None,
        "sink": 0 if dense else methods.budget.sink,
        "recent": 0 if dense else methods.budget.recent,
        "prompt_tokens": len(output.prompt_token_ids),
        "texts": token_texts(llm.tokenizer, ids),
        "layers": layers,
        "readers": [[None if dense else group for group in read_by[layer]] for layer in layers],
        "steps": recorder.steps,
    }


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of the few tokens before it; half of a character is U+FFFD."""
    texts = []
    for place in range(len(ids)):
        start = max(0, place - CONTEXT)
        before, after = (tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False) for stop in (place, place + 1))
        whole = before.rstrip("\ufffd")
        texts.append(after[len(whole) :] if after.startswith(whole) else tokenizer.decode([ids[place]]))
    return texts


def is_record(found: Any) -> bool:
    """Whether this is the content of a `selections.json` of this version."""
    if not isinstance(found, dict) or found.get("format") != FORMAT or not found.keys() >= KEYS:
        return False
    steps = found["steps"]
    return isinstance(steps, list) and bool(steps) and all(isinstance(step, dict) and step.keys() >= STEP_KEYS for step in steps)


def write_selections(directory: str | Path, record: dict[str, Any]) -> Path:
    """Write a record to `selections.json` in a directory, which is made where it is missing.

    Raises:
        SelectionError: it cannot be written.
    """
    file = Path(directory) / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{FILE}")
        draft.write_text(json.dumps(record, separators=(",", ":")), encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise SelectionError(f"{file} cannot be written: {error.strerror or error}") from error
    return file
