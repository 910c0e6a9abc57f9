"""The statistics of a request that ends: what was counted of it, and the clock's readings of it."""

from __future__ import annotations

from dataclasses import asdict, replace

from specontext.engine.generation import Generation
from specontext.engine.output_statistics import OutputStatistics
from specontext.engine.parts import Parts


def statistics_of(generation: Generation, parts: Parts, *, weights: str | None, recall: bool) -> OutputStatistics:
    """What the meter, the clock and the plan say of an output of which at least one token is there, while it has its seat.

    Args:
        weights: what is to be said of the model's weights.
        recall: whether attention recall was measured.
    """
    request, method, head = generation.request, parts.method, parts.head
    choice = request.choice or parts.methods.own
    made = len(request.token_ids) - request.prompt_length
    assert generation.first_token_at is not None and generation.last_token_at is not None
    report = parts.meter.report(request.seat)
    if not recall:
        report = replace(report, attention_recall=None, attention_recall_by_layer=None)
    return OutputStatistics(
        weights=weights,
        method=choice.method,
        budget=choice.budget or None,
        sink=method.sink,
        recent=method.recent,
        slots=method.slots if parts.kv.hot is not None else None,
        offload_layers=method.offload_layers,
        offloaded_layers=len(parts.kv.offloaded),
        moves=tuple(parts.residency.moves_since(generation.moves_before)),
        preemptions=request.preemptions,
        granularity=method.granularity,
        head_rope_theta=head.rope_theta if head is not None else None,
        head_yarn_factor=head.yarn_factor if head is not None else None,
        prompt_tokens=request.prompt_length,
        cached_tokens=request.cached_tokens or 0,
        completion_tokens=made,
        **asdict(report),
        captured_steps=request.captured_steps,
        queue_s=request.admitted_at - request.arrived if request.admitted_at is not None else None,
        ttft_s=generation.first_token_at - request.arrived,
        tpot_s=(generation.last_token_at - generation.first_token_at) / (made - 1) if made > 1 else None,
        step_s=parts.clock.step_s,
        expected_step_s=parts.clock.expected_s,
        waited_for=", ".join(request.waited_for) or None,
    )
