"""The engines of an evaluation: one for all methods, and one more for each further retrieval head; the weights are shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specontext.config import SpeContextConfig
from specontext.engine.llm import LLM
from specontext.errors import SpeContextError
from specontext.evaluation.budgets import largest
from specontext.evaluation.competitors import Competitor
from specontext.evaluation.settings import EvaluationSettings
from specontext.models.loading import LoadedModel
from specontext.retrieval.registry import FULL, base_of


@dataclass(frozen=True)
class Group:
    """Methods that one engine runs: those with the same retrieval head."""

    head: str | None
    competitors: tuple[Competitor, ...]


# Engine options on a GPU where nothing was said: compiling layers takes longer than it saves, but in hours.
GPU_OPTIONS: dict[str, Any] = {"compile": False}


class Engines:
    """Opens one engine at a time.

    Attributes:
        budget: the largest; where none was asked for, what the first engine's retrieval head recommends.
    """

    def __init__(self, loaded: LoadedModel, settings: EvaluationSettings) -> None:
        self.loaded, self.settings = loaded, settings
        longest = settings.engine.get("max_model_len") or loaded.shape.max_position
        self.budget: int | None = None
        if settings.budgets:
            self.budget = largest(settings.budgets, settings.lengths, longest, settings.least_budget)
        self._open: tuple[Group, LLM] | None = None

    def groups(self, competitors: Sequence[Competitor]) -> list[Group]:
        """Methods by retrieval head; those without one go with the evaluation's own."""
        heads = dict.fromkeys(competitor.head for competitor in competitors)
        return [Group(head, tuple(c for c in competitors if c.head == head)) for head in heads]

    def open(self, group: Group) -> LLM:
        """The engine of a group; an engine that was opened before is closed.

        Raises:
            SpeContextError: a method that cannot work on the model, or settings that do not fit.
        """
        if self._open is not None and self._open[0] == group:
            return self._open[1]
        self.close()
        settings, names = self.settings, [competitor.method for competitor in group.competitors]
        # Variants work on the state of their method; full attention costs nothing.
        methods = tuple(dict.fromkeys([*map(base_of, names), *names, FULL]))
        own = next((name for name in methods if name != FULL), FULL)
        config = SpeContextConfig(
            method=base_of(own),
            budget=self.budget,
            sink=settings.sink,
            recent=settings.recent,
            offload_layers=settings.offload_layers,
        )
        head = group.head if group.head is not None else settings.retrieval_head
        options = GPU_OPTIONS if self.loaded.model.device.type == "cuda" else {}
        llm = LLM(self.loaded, head, config, methods=methods, **options | settings.engine)
        self.budget, self._open = llm.config.budget, (group, llm)
        return llm

    def unsupported(self, competitors: Sequence[Competitor]) -> dict[Competitor, str]:
        """Methods that cannot work on the model, and why.

        Raises:
            SpeContextError: methods that work one by one and not together.
        """
        reasons: dict[Competitor, str] = {}
        for group in self.groups(competitors):
            try:
                self.open(group)
            except SpeContextError:
                alone = {one: self._failure(Group(group.head, (one,))) for one in group.competitors}
                if not any(alone.values()):
                    raise
                reasons |= {one: why for one, why in alone.items() if why is not None}
        return reasons

    def _failure(self, group: Group) -> str | None:
        try:
            self.open(group)
        except SpeContextError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Close the engine that is open."""
        if self._open is not None:
            self._open[1].engine.close()
            self._open = None
