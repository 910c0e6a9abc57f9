"""Requests that an engine runs before anybody else's, so that theirs find everything loaded, and forgets again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specontext.errors import LogitsError, RequestError, RequestFailedError
from specontext.sampling_params import SamplingParams

if TYPE_CHECKING:  # it calls this
    from specontext.engine.llm_engine import LLMEngine

PROMPT = 48  # tokens: a few pages
OUTPUT = 6
# Greedy, and what sampling does besides: limits by rank and by mass, and log-probabilities, with which logits are of 32 bits.
WAYS = (
    SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True),
    SamplingParams(temperature=1.0, top_k=20, seed=0, max_tokens=OUTPUT, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=1.0, top_p=0.9, seed=0, max_tokens=OUTPUT, ignore_eos=True),
)
ALONE = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=0, max_tokens=OUTPUT, ignore_eos=True)  # logits as they are


def rehearse(engine: LLMEngine) -> None:
    """Run small requests that begin one after the other, so that there are steps of chunks, of decode tokens and of both, and one
    whose prompt begins as another's: what is known of it is brought, and its chunk reads stored tokens. Layers move meanwhile.

    What they leave is forgotten: nothing is known of their prompts, and no statistics count them. Where not even such a request
    has room there is nothing to rehearse.
    """
    assert not engine.has_work, "requests of others would be forgotten too"
    length = min(PROMPT, engine.parts.max_tokens - OUTPUT)
    prompts = {f"rehearsal-{number}": [number] * length for number in range(min(len(WAYS), engine.config.max_num_seqs))}
    begun = []
    try:
        for (name, prompt), params in zip(prompts.items(), WAYS, strict=False):
            engine.scheduler.check(length, params)
            begun.append(engine.add_request(name, prompt, params, checked=True))
            engine.step()
            engine.step()
            engine.parts.residency.rehearse(engine.scheduler.admission.stored)
            _ = begun[0].detokenizer.text
        while not all(generation.finished for generation in begun):
            engine.step()
        again = [*prompts["rehearsal-0"][:-1], 1]  # another token at its end, or all of its pages would be known
        begun.append(engine.add_request("rehearsal-again", again, ALONE, checked=True))
        while not begun[-1].finished:
            engine.step()
    except (RequestError, LogitsError, RequestFailedError):  # a model that fails does so for those who ask
        for name in (*prompts, "rehearsal-again"):
            engine.abort(name)
    engine.scheduler.forget()
