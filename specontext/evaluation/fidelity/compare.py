"""One window of text through the engine: full attention and methods beside each other, the window's own tokens forced.

Every request is the same prompt with the same forced output, so their next-token distributions at a position are comparable. A
row of logits lives until all requests have passed its position; they decode in the same steps, so it is a few rows at a time.

Shapes use R requests, V vocabulary size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specontext.core import SamplingParams
from specontext.distill.fidelity import measures
from specontext.engine.llm import LLM
from specontext.evaluation.fidelity.windows import Window


@dataclass(frozen=True)
class Fidelity:
    """A method's next-token distributions beside those of full attention, means over the compared positions of a window.

    Attributes:
        agreement: share of positions at which both find the same token the most likely one.
        kl_divergence: KL(full || method) in nats.
        cross_entropy, full_cross_entropy: of the text's tokens, in nats a token; perplexity is their exponential.
        stats: of the method's request, as `LLM.generate` gives them.
    """

    agreement: float
    kl_divergence: float
    cross_entropy: float
    full_cross_entropy: float
    stats: dict[str, Any]


class _Comparison:
    """Compares rows of logits with those of request 0 as they come.

    Args:
        targets: the text's token at every position.
        wanted: positions at which distributions are compared.
    """

    def __init__(self, targets: Sequence[int], wanted: Sequence[bool], requests: int, device: torch.device) -> None:
        self.targets, self.wanted, self.requests = targets, wanted, requests
        self.sums = torch.zeros((requests, 3), dtype=torch.float64, device=device)
        self._seen = [-1] * requests  # the first logits are the prompt's, which is computed in the same way for all
        self._new: dict[int, dict[int, Tensor]] = defaultdict(dict)  # by position and request
        self._full: dict[int, Tensor] = {}
        self._left: dict[int, int] = defaultdict(lambda: requests)

    def see(self, request: int, logits: Tensor) -> None:
        """Take a row [V] of a request, position after position."""
        position = self._seen[request]
        self._seen[request] += 1
        if position >= 0 and self.wanted[position]:
            self._new[position][request] = logits.clone()

    def settle(self) -> None:
        """Compare what can be compared, after a step."""
        for position in list(self._new):
            if 0 in self._new[position]:
                self._full[position] = self._new[position][0]
            if position in self._full:
                rows = self._new.pop(position)
                numbers = torch.tensor(list(rows), device=self.sums.device)
                measured = measures(self._full[position], torch.stack(list(rows.values())), self.targets[position])
                self.sums.index_add_(0, numbers, measured)
                self._left[position] -= len(rows)
                if not self._left[position]:
                    del self._left[position], self._full[position]


def compare_window(llm: LLM, window: Window, choices: Sequence[tuple[str, int | None]], *, seed: int = 0) -> list[Fidelity]:
    """Compare methods with full attention where a window wants it, all in one batch.

    The token before the first that may be compared is the first that is decoded; all before it are the prompt.

    Args:
        llm: runs `full` and all methods.
        choices: methods and budgets.
        seed: of the method `random`.

    Returns:
        Full attention's own, then one for each choice.
    """
    engine = llm.engine
    prompt, forced = window.prompt, window.token_ids[len(window.prompt) :]
    everyone = [("full", None), *choices]
    comparison = _Comparison(forced[1:], window.wanted, len(everyone), engine.device)
    greedy = SamplingParams(temperature=0.0, seed=seed, ignore_eos=True, max_tokens=len(forced))
    generations = []
    try:
        for number, (method, budget) in enumerate(everyone):
            params = replace(greedy, method=method, budget=budget)
            see = partial(comparison.see, number)
            generations.append(engine.add_request(f"fidelity-{number}", prompt, params, forced=forced, on_logits=see))
        while not all(generation.finished for generation in generations):
            engine.step()
            comparison.settle()
    finally:
        for generation in generations:
            if not generation.finished:
                engine.abort(generation.request.request_id)
    means = (comparison.sums / sum(window.wanted)).tolist()
    return [
        Fidelity(agreement, divergence, entropy, means[0][2], made.stats or {})
        for (agreement, divergence, entropy), made in zip(means, generations, strict=True)
    ]
