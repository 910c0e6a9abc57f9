"""What an engine is made of; `build.py` makes it."""

from __future__ import annotations

from dataclasses import dataclass

from specontext.config import SpeContextConfig, StepTokens
from specontext.engine.methods import Methods
from specontext.engine.prefix import PrefixCache
from specontext.engine.residency import Residency
from specontext.engine.statistics import Meter
from specontext.kv.cache import KVCache
from specontext.memory.learning import LearnedClock
from specontext.memory.model import MemoryModel
from specontext.memory.throughput import ServiceLimits
from specontext.memory.tiers import TierSizes
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.selector import Selector


@dataclass(frozen=True)
class Parts:
    """What a runner works with.

    Attributes:
        method: settings of the engine's own method.
        methods: it and those that requests may name.
        prefix: what requests know of each other's prompts.
        plan: bytes of everything.
        clock: how long steps are expected to take, as the engine's own have taken.
        limits: what users set for how many requests run at once.
        max_tokens: longest context of one request.
        step_tokens: of one step.
        captures_chunks: short chunks of prompts run as captured graphs, on a GPU.
        head: the retrieval head, for the methods that have one.
    """

    method: SpeContextConfig
    methods: Methods
    kv: KVCache
    prefix: PrefixCache
    meter: Meter
    residency: Residency
    plan: MemoryModel
    sizes: TierSizes
    clock: LearnedClock
    limits: ServiceLimits
    max_tokens: int
    step_tokens: StepTokens
    captures_chunks: bool
    head: RetrievalHead | None = None

    @property
    def selector(self) -> Selector:
        """The engine's own method."""
        return self.methods.selector
