"""What must be the same on all ranks between two steps, in a few numbers."""

from __future__ import annotations

from specontext.engine.llm_engine import LLMEngine


def state_of(engine: LLMEngine) -> object:
    """Who runs and how far, who waits, and what is free: ranks that differ in these would compute different batches."""
    kv, scheduler = engine.parts.kv, engine.scheduler
    running = [(r.request_id, r.seat, r.computed, r.token_ids[-1]) for r in scheduler.running]
    return running, len(scheduler.waiting), kv.arena.pages.num_free, kv.host.pages.num_free, len(kv.offloaded)
