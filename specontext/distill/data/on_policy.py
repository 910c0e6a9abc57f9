"""Sequences that the target has written itself."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from typing import Any, NamedTuple, Protocol

from specontext.config import SpeContextConfig
from specontext.core import RequestOutput
from specontext.distill.data.encoder import Encoder
from specontext.distill.data.mixing import Sizes
from specontext.distill.data.source import DataError, Row, Sequences, Source, check_size, collate
from specontext.model_shape import ModelShape
from specontext.sampling_params import SamplingParams

PROMPT_STEPS = 1 << 40  # prompts come from steps of their source that ordinary training never reaches
LONGEST_BLOCK = 16  # steps
KEPT_BLOCKS = 4


class Job(NamedTuple):
    """A step that is drawn, with its size."""

    step: int
    length: int
    rows: int


class Generator(Protocol):
    """The part of `specontext.LLM` that is needed here."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def config(self) -> SpeContextConfig: ...

    @property
    def shape(self) -> ModelShape: ...

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]: ...


class OnPolicy:
    """Prompts from another source, continued by the target up to the row's length or its own end.

    The prompt of a row with answers is everything before the first of them; that of running text, in which everything is to
    be said, is its first part, a drawn share between a quarter and three quarters. The positions before generated tokens are
    wanted. Rows whose output ends early are short.

    Consecutive steps are generated together, in blocks. Unless `sizes` tells otherwise, all steps of a block are taken to have
    the size that is asked for; a step of another size than its neighbours then costs a block of its own.

    Args:
        source: where prompts come from.
        llm: the target, under method 'full'.
        temperature: 0 is greedy.
        together: sequences generated at once, where a step alone has fewer.
        sizes: length and rows that each step will be asked for with, where the training knows (under `Mixed`: `sizes_of_share`).

    Raises:
        DataError: the LLM selects KV entries, so that its outputs would not be the target's own.
    """

    def __init__(
        self,
        source: Source,
        llm: Generator,
        *,
        seed: int,
        temperature: float = 1.0,
        together: int = 16,
        sizes: Sizes | None = None,
    ) -> None:
        if llm.config.method != "full":
            raise DataError(f"on-policy sequences need an LLM of method 'full', got '{llm.config.method}'")
        if together < 1:
            raise DataError(f"at least 1 sequence is generated at once, got {together}")
        self.source, self.llm, self.seed, self.temperature, self.together = source, llm, seed, temperature, together
        self.sizes, self.pad = sizes, Encoder(llm.tokenizer, llm.shape.vocab_size).pad
        self._made: OrderedDict[tuple[Job, ...], dict[int, Sequences]] = OrderedDict()

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        """See `Source.draw`.

        Raises:
            RequestError: the length exceeds what the LLM has room for.
        """
        check_size(step, length, rows)
        block = self._block(Job(step, length, rows))
        if block not in self._made:
            self._made[block] = self._generate(block)
            if len(self._made) > KEPT_BLOCKS:
                self._made.popitem(last=False)
        return self._made[block][step]

    def _block(self, asked: Job) -> tuple[Job, ...]:
        """The steps that are generated together with `asked`: a function of it and of the sizes alone."""
        known = self.sizes if self.sizes is not None and self.sizes(asked.step) == asked[1:] else None
        first = asked.step - asked.step % LONGEST_BLOCK
        block: list[Job] = []
        for step in range(first, first + LONGEST_BLOCK):
            job = Job(step, *(known(step) if known is not None else asked[1:]))
            if sum(other.rows for other in block) >= self.together:
                if asked in block:
                    break
                block = []
            block.append(job)
        return tuple(block)

    def _generate(self, block: tuple[Job, ...]) -> dict[int, Sequences]:
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        for job in block:
            given = self.source.draw(PROMPT_STEPS + job.step, job.length, job.rows)
            for n in range(job.rows):
                rng = random.Random(f"on policy/{self.seed}/{job.step}/{job.length}/{n}")
                prompts.append(given.ids[n, : prompt_length(given, n, rng)].tolist())
                room = job.length - len(prompts[-1])
                params.append(SamplingParams(temperature=self.temperature, seed=rng.randrange(2**63 - 1), max_tokens=room))
        rows = deque(map(continued, prompts, self.llm.generate(prompts, params)))
        return {job.step: collate([rows.popleft() for _ in range(job.rows)], job.length, self.pad) for job in block}


def continued(prompt: list[int], output: RequestOutput) -> Row:
    """A prompt and what was generated."""
    row = Row()
    row.add(prompt, False)
    row.add(output.token_ids, True)
    return row


def prompt_length(given: Sequences, n: int, rng: random.Random) -> int:
    """Tokens of sequence `n` that are its prompt: those before the first answer, or of running text a drawn share."""
    wanted = given.wanted[n].nonzero().flatten()
    share = rng.uniform(0.25, 0.75)  # drawn in any case, so that what is drawn next does not depend on the sequence
    if len(wanted) and wanted[0] > 0:
        return int(wanted[0]) + 1
    return max(1, int(int(given.lengths[n]) * share))
