"""Results of an evaluation that never took place, in every shape that reports have to cope with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCORES = {"full": 0.92, "speculative": 0.91, "quest": 0.80, "oracle": 0.915, "streaming": 0.30, "random": 0.05}


def made_row(method: str, budget: int | None, length: int | None = 4096, task: str = "needle", **changes: Any) -> dict[str, Any]:
    """A row with all keys; full attention has no budget."""
    score = SCORES.get(method, 0.5)
    read = float(budget or length or 3000)
    row = {
        "suite": "ruler",
        "task": task,
        "method": method,
        "budget": budget,
        "length": length,
        "n": 20,
        "score": score,
        "ci_low": max(0.0, score - 0.05),
        "ci_high": min(1.0, score + 0.05),
        "tokens_read": read,
        "selection_bytes": 0.0 if method == "full" else 65536.0,
        "bytes_loaded": 2048.0,
        "overlap": None if method == "full" else 0.85,
        "attention_recall": 1.0 if method == "full" else 0.9,
        "output_tokens": 12.5,
        "seconds": 0.7,
    }
    return row | changes


def made_pair(
    method: str,
    other: str,
    low: float,
    high: float,
    budget: int = 512,
    length: int | None = 4096,
    task: str = "needle",
    **changes: Any,
) -> dict[str, Any]:
    """A paired difference in the middle of its interval."""
    names = {"suite": "ruler", "task": task, "method": method, "other": other, "budget": budget, "length": length, "n": 20}
    return names | {"difference": (low + high) / 2, "ci_low": low, "ci_high": high} | changes


def made_results(
    methods: Sequence[str] = tuple(SCORES),
    budgets: Sequence[int] = (128, 512),
    lengths: Sequence[int | None] = (2048, 4096),
    tasks: Sequence[str] = ("needle", "tracing"),
) -> dict[str, Any]:
    """A whole evaluation, with the differences of all pairs of methods."""
    rows = [
        made_row(method, budget, length, task)
        for task in tasks
        for length in lengths
        for method in methods
        for budget in ((None,) if method == "full" else budgets)
    ]
    pairs = []
    for task in tasks:
        for length in lengths:
            for budget in budgets:
                for place, method in enumerate(methods):
                    for other in methods[place + 1 :]:
                        gap = SCORES[method] - SCORES[other]
                        pairs.append(made_pair(method, other, gap - 0.03, gap + 0.03, budget, length, task))
    meta = {
        "model": "nano",
        "head": "auto",
        "command": "specontext eval nano --suite ruler -o out",
        "date": "2026-01-02",
        "machine": {"processor": "two cores", "memory": "8 GiB"},
        "versions": {"specontext": "0.1.0", "torch": "2.8"},
        "seed": 0,
        "skipped": [{"task": "words", "length": 512, "why": "does not fit in 512 tokens"}],
    }
    return {"meta": meta, "rows": rows, "pairs": pairs}


def made_selections(texts: Sequence[str] | None = None) -> dict[str, Any]:
    """A record of three steps over eight tokens of prompt; one layer, two KV heads that read different sets."""
    texts = [*(texts or [f" word{place}" for place in range(8)]), " a", " b", " c", " d"]
    steps = []
    for number in range(3):
        length = 9 + number
        first, second = [1, 2 + number, 8 - number + number - 2], [1, 1, 6 + number]
        heads = [
            {"set": 0, "recall": 0.5 + 0.1 * number, "top": [2 + number, 5], "mass": [4000, 1500]},
            {"set": 1, "recall": 0.9, "top": [1], "mass": [9000]},
        ]
        steps.append({"length": length, "sets": [first, second], "heads": [heads]})
    return {
        "format": 1,
        "model": "nano",
        "head": None,
        "method": "speculative",
        "budget": 4,
        "sink": 1,
        "recent": 1,
        "prompt_tokens": 8,
        "texts": texts,
        "layers": [0],
        "readers": [[1, 0]],
        "steps": steps,
    }


def write(folder: Path, results: Any = None, selections: Any = None) -> Path:
    """The files that a report is made from."""
    for name, content in (("results.json", results), ("selections.json", selections)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder
