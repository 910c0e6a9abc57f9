"""The nouns that rooms exchange: requests, batches, selections, slot plans and outputs.

Shapes use R requests, S tokens in context, L layers, Hq query heads, Hkv KV heads, G retrieval groups, D head dim, B budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from specontext.errors import RequestError
from specontext.sampling_params import SamplingParams

if TYPE_CHECKING:  # torch takes seconds to import, and only annotations here need it
    from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """How the KV entries of a request are chosen: a method's name, and its budget (0 for a method that reads everything)."""

    method: str
    budget: int


class AllowedTokens(NamedTuple):
    """What a grammar allows next: row `row` of the masks of a step, [outputs that follow a grammar, ..] on the device.

    Those for a GPU are int32 words: bit t % 32 of word t // 32 says whether token t may come. A CPU's are float32, what is added
    to logits: 0 for allowed tokens and minus infinity for others.
    """

    masks: Tensor
    row: int


@dataclass(eq=False)
class Request:
    """One output being made: its tokens, how many of them the model has seen, and its seat in the KV tables.

    `computed <= len(token_ids) + unread`: tokens catch up; a request whose prompt is computed decodes one token a step.

    Attributes:
        choice: how its KV entries are chosen; None is the engine's own way.
        index: which of the `n` outputs of its prompt this is; part of the key of its random numbers.
        seat: row of this request in every per-request table, -1 while it waits.
        room: tokens for which its seat has pages; 0 while it waits.
        prefill_length: tokens that are computed densely: the prompt, and what had been generated before a restart.
        arrived, admitted_at: `time.perf_counter()` when it came, and when it got its first seat.
        preemptions: how often it had to wait again.
        captured_steps: decode steps that were replayed as a captured CUDA graph.
        cached_tokens: tokens whose KV was known when it first got a seat; None before.
        history: what the sampler remembers of the tokens, for penalties.
        allowed: what a grammar allows next; None allows all. Valid in one step.
        banned: sequences of tokens of which the last one may not follow the others.
        unread: tokens behind `token_ids` that the device has chosen and the host does not know yet.
        waiting_since: `time.perf_counter()` when it came, or when it had to wait again.
        waited_for: why it had to wait, what holds it last.
        urgent: it has waited as long as users allow, so layers leave for it.
        set_back: how many requests had ended when it was made to wait for the sake of tokens a second; None where it was not.
        let_in: the same of when layers began to leave for it.
        awaited: somebody reads its tokens as they come; where nobody does, larger chunks of prompts stand beside them.
        held: its next token is not known yet, since it is chosen elsewhere: no step takes it, and it is the first to make room.
        prompt_logprobs: for each prompt token the log-probabilities by token id, None for the first one; it grows while the
            prompt is computed and is complete before the first token is sampled.
    """

    request_id: str
    token_ids: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    choice: Choice | None = None
    index: int = 0
    seat: int = -1
    room: int = 0
    computed: int = 0
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    arrived: float = 0.0
    admitted_at: float | None = None
    prefill_length: int = 0
    preemptions: int = 0
    captured_steps: int = 0
    cached_tokens: int | None = None
    history: object = None
    allowed: AllowedTokens | None = None
    banned: Sequence[Sequence[int]] = ()
    unread: int = 0
    awaited: bool = True
    held: bool = False
    waiting_since: float = 0.0
    waited_for: list[str] = field(default_factory=list)
    urgent: bool = False
    set_back: int | None = None
    let_in: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.prompt_length <= len(self.token_ids):
            raise RequestError("a request needs at least one prompt token")
        self.prefill_length = self.prefill_length or self.prompt_length

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def decoding(self) -> bool:
        """Whether the next step takes one generated token (else a chunk of the prompt)."""
        return self.computed >= self.prefill_length

    def restart(self) -> None:
        """Forget what was computed: all tokens so far are computed again, densely, like a prompt."""
        self.computed, self.prefill_length = 0, len(self.token_ids)


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one request inside a packed batch: positions start .. start + length - 1."""

    seat: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Lane:
    """Decode tokens start .. stop - 1 of a batch, whose requests choose in the same way.

    Attributes:
        span: none of them has more tokens in context.
    """

    choice: Choice | None
    start: int
    stop: int
    span: int


@dataclass(frozen=True)
class Batch:
    """The packed tokens of one step: decode tokens first (one a request), then prefill chunks.

    Attributes:
        token_ids, positions, seats: int64 [T] on the device; a negative position is padding.
        lengths: int64 [T], tokens in context of the token's request once this step is stored.
        seeds: int64 [R], of the decoding requests.
        num_decodes: R, how many of the first tokens are decode tokens.
        prefills: chunks of prompts, after the decode tokens.
        last_tokens: int64 [requests], packed index of every request's last token.
        span: no decoding request has more tokens in context. The host knows it, so nothing has to ask the device.
        lanes: the decode tokens by how their requests choose; where none are given, all choose in the engine's own way.
    """

    token_ids: Tensor
    positions: Tensor
    seats: Tensor
    lengths: Tensor
    seeds: Tensor
    num_decodes: int
    prefills: tuple[Segment, ...]
    last_tokens: Tensor
    span: int
    lanes: tuple[Lane, ...] = ()

    def __post_init__(self) -> None:
        total = self.num_decodes + sum(segment.length for segment in self.prefills)
        assert self.token_ids.shape == self.positions.shape == self.seats.shape == self.lengths.shape == (total,)
        assert len(self.last_tokens) == self.num_decodes + len(self.prefills)
        assert self.seeds.shape == (self.num_decodes,)
        expected = self.num_decodes
        for segment in self.prefills:
            assert segment.offset == expected and segment.length > 0
            expected += segment.length
        if self.num_decodes and not self.lanes:
            object.__setattr__(self, "lanes", (Lane(None, 0, self.num_decodes, self.span),))
        assert [lane.start for lane in self.lanes] == [0, *(lane.stop for lane in self.lanes)][: len(self.lanes)]
        assert not self.num_decodes or self.lanes[-1].stop == self.num_decodes


@dataclass(frozen=True)
class Selection:
    """KV entries that attention may read in one decode step.

    Attributes:
        tokens: int64 [R, G, B] token positions: sinks, scored tokens, recent tokens, each part ascending and then padded with -1,
            which is no entry.
        scored: bool [R, G, B], the entries that were chosen by a score (neither sink nor recent).
    """

    tokens: Tensor
    scored: Tensor

    def __post_init__(self) -> None:
        assert self.tokens.dim() == 3 and self.tokens.shape == self.scored.shape


@dataclass(frozen=True)
class SlotPlan:
    """What one selection moves, the same for every offloaded layer that reads it.

    Attributes:
        slots: int64 [R, G, B], the device slot of every selected entry, -1 for padding.
        missing: bool [R, G, B], entries that must be copied from the host into their slot.
    """

    slots: Tensor
    missing: Tensor


@dataclass
class CompletionOutput:
    """One generated output.

    Attributes:
        finish_reason: "stop" (end token or stop string) or "length"; None while it streams.
        logprobs: for each token the log-probabilities by token id: the chosen token and the most likely ones.
        reasoning: the thinking before the text, where `SamplingParams.thinking` tells it apart.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, float]] | None = None
    stats: dict[str, object] = field(default_factory=dict)
    reasoning: str = ""


@dataclass
class RequestOutput:
    """What `LLM.generate` returns for one prompt; `text`, `token_ids`, `finish_reason` and `stats` are the first output's.

    Attributes:
        prompt_logprobs: for each prompt token the log-probabilities by token id: the token itself and the most likely ones. None
            for the first token, before which there is nothing.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, float] | None] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stats(self) -> dict[str, object]:
        return self.outputs[0].stats
