"""A head under training, judged on held-out sequences: attention recall, and what the target loses with its selections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from specontext.distill.data import Source
from specontext.distill.fidelity import COMPARED, Loss, measure_losses
from specontext.distill.recall import measure
from specontext.distill.target import Target
from specontext.distill.trainer import CRITERION
from specontext.retrieval.head import RetrievalHead

SHARES = (8, 16)  # budgets are 1/8 and 1/16 of the length
TOKENS = 8192  # of a batch, at most
WINDOWS = 8  # whose last tokens are compared
POSITIONS = 64  # that are compared at the end of each


@dataclass(eq=False)
class HeldOut:
    """Measures a head at the longest length and at a quarter of it, the same sequences every time.

    Attributes:
        references: what is lost with the selections that do not depend on the head, by length, once they are known.
    """

    target: Target
    source: Source
    length: int
    sink: int
    recent: int
    references: dict[int, dict[int, dict[str, Loss]]] = field(default_factory=dict)

    def judge(self, head: RetrievalHead, rounds: int) -> dict[str, float]:
        """Entries for the log.

        Returns:
            by length and budget `recall`, `of_shared_oracle` (recall as a share of the shared oracle's), and of the model's
            output under the selections `kl`, `perplexity_ratio` and `agreement`, with `kl_shared_oracle` and `kl_window` beside
            them; `CRITERION` is the mean KL. What the lengths leave no room for, or no sequence is long enough for, is missing.
        """
        found: dict[str, float] = {}
        divergences: list[float] = []
        for length in (self.length, self.length // 4):
            budgets = [length // share for share in SHARES if length // share > self.sink + self.recent]
            if not budgets:
                continue
            kept = {"sink": self.sink, "recent": self.recent}
            recalls = measure(head, self.target, self._batches(length, rounds), budgets, **kept)
            for budget, recall in recalls.items():
                found[f"recall_{length}_{budget}"] = round(recall["head"], 4)
                found[f"of_shared_oracle_{length}_{budget}"] = round(recall["head"] / recall["shared"], 4)
            for budget, losses in self._losses(head, length, budgets).items():
                mine = losses["head"]
                divergences.append(mine.kl_divergence)
                found[f"kl_{length}_{budget}"] = round(mine.kl_divergence, 5)
                found[f"kl_shared_oracle_{length}_{budget}"] = round(losses["shared"].kl_divergence, 5)
                found[f"kl_window_{length}_{budget}"] = round(losses["window"].kl_divergence, 5)
                found[f"perplexity_ratio_{length}_{budget}"] = round(mine.perplexity_ratio, 4)
                found[f"agreement_{length}_{budget}"] = round(mine.agreement, 4)
        if divergences:
            found[CRITERION] = round(sum(divergences) / len(divergences), 6)
        return found

    def _losses(self, head: RetrievalHead, length: int, budgets: list[int]) -> dict[int, dict[str, Loss]]:
        known = self.references.get(length)
        losses = measure_losses(
            head,
            self.target,
            self._batches(length, -(-WINDOWS // self._rows(length))),
            budgets,
            queries=min(POSITIONS, length // 4),
            sink=self.sink,
            recent=self.recent,
            compared=COMPARED if known is None else ("head",),
        )
        self.references.setdefault(length, losses)
        return {budget: self.references[length][budget] | found for budget, found in losses.items()}

    def _rows(self, length: int) -> int:
        return max(1, min(4, TOKENS // length))

    def _batches(self, length: int, rounds: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(rounds):
            sequences = self.source.draw(step, length, self._rows(length))
            yield sequences.ids, sequences.wanted
