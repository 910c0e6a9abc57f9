"""Windows of text through the engine: what full attention expects next and what methods do, the text's own tokens forced.

Full attention runs first, and its logits at the compared positions are kept; then methods run, as many requests at once as the
engine has seats, and each row of theirs is compared in the step in which it is made. Every request of a window has the same
prompt and the same forced output, so next-token distributions at a position are comparable.

Shapes use R rows of logits, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specontext.distill.fidelity import measures
from specontext.engine.generation import Generation
from specontext.engine.llm import LLM
from specontext.evaluation.windows import Window
from specontext.sampling_params import SamplingParams

LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # of full attention that are kept
ROWS = 32  # that are compared at a time, in float64

Choice = tuple[str, int | None]  # method and budget


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


class Comparison:
    """Some windows that methods are compared on.

    Args:
        windows: no more than `most_windows` says.
        seed: of the method `random`.

    Attributes:
        full: full attention's own numbers, for each window.
    """

    def __init__(self, llm: LLM, windows: Sequence[Window], *, seed: int = 0) -> None:
        self.llm, self.windows, self.seed = llm, windows, seed
        self._targets = [torch.tensor(window.token_ids[-len(window.wanted) :], device=llm.engine.device) for window in windows]
        self._full: list[dict[int, Tensor]] = [{} for _ in windows]
        self.full = [found[0] for found in self._run([("full", None)], self._keep)]

    def methods(self, choices: Sequence[Choice]) -> list[list[Fidelity]]:
        """Fidelity of methods and budgets, for each window in the order of `choices`."""
        return self._run(choices, None)

    def _keep(self, window: int, position: int, row: Tensor) -> None:
        self._full[window][position] = row.clone()

    def _run(self, choices: Sequence[Choice], keep: Callable[[int, int, Tensor], None] | None) -> list[list[Fidelity]]:
        """Decode the last tokens of every window with every choice, all in one batch.

        The token before the first that may be compared is the first that is decoded; all before it are the prompt.
        """
        engine = self.llm.engine
        jobs = [(window, choice) for window in range(len(self.windows)) for choice in choices]
        sums = torch.zeros((len(jobs), 3), dtype=torch.float64, device=engine.device)
        seen = [-1] * len(jobs)  # the first logits are the prompt's, which is computed in the same way for all
        new: list[tuple[int, int, int, Tensor]] = []  # job, window, position and row of a step

        def see(job: int, logits: Tensor) -> None:
            position, window = seen[job], jobs[job][0]
            seen[job] += 1
            if position < 0 or not self.windows[window].wanted[position]:
                return
            if keep is not None:
                keep(window, position, logits)
            new.append((job, window, position, logits))

        generations = []
        try:
            for number, (window, (method, budget)) in enumerate(jobs):
                prompt = self.windows[window].prompt
                forced = self.windows[window].token_ids[len(prompt) :]
                params = SamplingParams(
                    temperature=0.0, seed=self.seed, ignore_eos=True, max_tokens=len(forced), method=method, budget=budget
                )
                name = f"fidelity-{number}"
                see_it = partial(see, number)
                generations.append(engine.add_request(name, prompt, params, forced=forced, on_logits=see_it, awaited=False))
            while not all(generation.finished for generation in generations):
                engine.step()
                self._compare(new, sums)
                new.clear()
        finally:
            for generation in generations:
                if not generation.finished:
                    engine.abort(generation.request.request_id)
        wanted = torch.tensor([sum(self.windows[window].wanted) for window, _ in jobs], device=sums.device)
        means, made = (sums / wanted[:, None]).tolist(), iter(generations)
        found: list[list[Fidelity]] = []
        for window in range(len(self.windows)):
            rows = means[window * len(choices) : (window + 1) * len(choices)]
            own = rows[0][2] if keep is not None else self.full[window].cross_entropy
            found.append([Fidelity(row[0], row[1], row[2], own, _stats(next(made))) for row in rows])
        return found

    def _compare(self, new: Sequence[tuple[int, int, int, Tensor]], sums: Tensor) -> None:
        """Compare the rows of a step, before the next one writes over them."""
        for start in range(0, len(new), ROWS):
            some = new[start : start + ROWS]
            full = torch.stack([self._full[window][position] for _, window, position, _ in some])
            logits = torch.stack([row for _, _, _, row in some])
            targets = torch.stack([self._targets[window][position] for _, window, position, _ in some])
            jobs = torch.tensor([job for job, _, _, _ in some], device=sums.device)
            sums.index_add_(0, jobs, measures(full, logits, targets))


def _stats(generation: Generation) -> dict[str, Any]:
    return generation.stats.as_dict() if generation.stats is not None else {}


def most_windows(llm: LLM, compared: int) -> int:
    """Windows whose full logits may be kept at a time, no more than the engine has seats for."""
    row = llm.shape.vocab_size * llm.shape.dtype.itemsize
    fit = LOGITS_BYTES[llm.engine.device.type] // (row * compared)
    return max(1, min(fit, llm.engine.config.max_num_seqs))
