"""How long a step is expected to take on a machine: its bytes by part over measured bandwidths, and what launching costs.

`speed.py` has floors; this is an expectation, calibrated on captured steps of Llama-3.1-8B's shape on an H200 and an H100
(bfloat16, budget 2048, 2560 slots; tests/memory/test_step_time.py has the measurements), which it meets within 10 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from specontext.memory.facts import ModelFacts
from specontext.memory.layer_blocks import LEAST_PIECE

OVERLAP = 0.85  # share of the selected entries that the last step selected too, where nothing is known of it

# Shares of the device's bandwidth that parts of a step reach. Matrices are read at full speed for one token; for several the
# products work in tiles and reach a little less. All rows are read in their order; those of a selection are smaller pieces.
ONE_TOKEN, SEVERAL_TOKENS, ALL_ROWS, ROWS = 1.0, 0.9, 0.92, 0.7
LOADS = 0.95  # of the bandwidth from the host, beside the layers before
MOST_EXTRA_S, MOST_BUS = 10.0, 50.0  # that are believed
# Of ranks that share a model: seconds of a sum over them beyond its bytes, and bytes of hidden states and logits a second; by
# sums of an 8B shape's layers on two H200 (benchmarks/results/h200/sums.txt).
SUM_S, BETWEEN_RANKS = 7.6e-6, 150e9
LOGIT = 4  # bytes
# Of the rate of products of 4,096 numbers each way, what a prompt's chunk reaches: from 2,048 to 32,768 tokens of an 8B shape are
# expected within 3 % of what an H200 takes (benchmarks/results/h200/paper, end-to-end-first-tokens.txt).
PRODUCTS = 0.87
# Of steps with layers on the host (benchmarks/results/h200/loads-beside-steps.txt): seconds in which a request's slots are looked
# up and chosen, and the share of the bus's time by which what runs beside it takes longer.
PLANNED_S, BESIDE = 7.5e-6, 0.2


@dataclass(frozen=True)
class MachineSpeed:
    """What a machine reaches.

    Attributes:
        name: of the device, for people.
        device: bytes a second that reading the device's memory reaches.
        host: bytes a second of random pieces that are read from pinned host memory.
        products: floating-point operations a second of large matrix products.
        layer_s: seconds that launching a layer's kernels takes beyond what they read, in a captured step.
        offloaded_s: the same of what an offloaded layer does besides: writing and looking up slots.
        step_s: seconds of a step around its layers: sampling, packing, the loop.
        pinned: bytes of host memory that could be pinned when that was tried; None where nothing was pinned.
        piece: bytes that are read at `host`; a smaller piece takes as long.
    """

    name: str
    device: float
    host: float
    products: float
    layer_s: float
    offloaded_s: float
    step_s: float
    pinned: int | None = None
    piece: int = 1


# Device bandwidths are those of a sum over 4 GiB; `host` is of pieces of 2 KiB. 1.75 ms of a captured step of 32 layers are not
# explained by bytes on either GPU.
H100 = MachineSpeed("NVIDIA H100", 3.1e12, 50e9, 600e12, layer_s=50e-6, offloaded_s=8e-6, step_s=150e-6, piece=LEAST_PIECE)
H200 = replace(H100, name="NVIDIA H200", device=4.4e12, products=720e12)
KNOWN_MACHINES = (H200, H100)
# Two cores of a server; both tiers are its memory, so little depends on these.
CPU = MachineSpeed("CPU", 20e9, 10e9, 1e11, layer_s=300e-6, offloaded_s=50e-6, step_s=1e-3)


def known_machine(name: str) -> MachineSpeed:
    """The known GPU that a device's name contains; an H100 where it is none of them."""
    return next((known for known in KNOWN_MACHINES if known.name.split()[-1] in name), H100)


@dataclass(frozen=True)
class StepTime:
    """A step as it is expected.

    Attributes:
        seconds: all of it.
        compute_s: reading the device's memory, computing and launching.
        loads_s: from the moment at which rows are chosen until those of the last block of layers have come.
        bus_s: of these what the bus takes.
    """

    seconds: float
    compute_s: float
    loads_s: float
    bus_s: float = 0.0

    @property
    def loads_limit(self) -> bool:
        """Whether the step waits for its loads."""
        return self.loads_s > self.compute_s


@dataclass(frozen=True)
class StepClock:
    """Expected times of a model's steps on a machine.

    Attributes:
        budget: entries that a KV head reads; None where it reads all.
        overlap: share of them that the step before has read too.
        extra_s: seconds of a step that were found beyond what launches are expected to take; may be negative.
        bus: how many times as long as expected loads were found to take.
        ranks: that share the model; the facts are of one of them.
    """

    facts: ModelFacts
    machine: MachineSpeed
    budget: int | None
    overlap: float = OVERLAP
    extra_s: float = 0.0
    bus: float = 1.0
    ranks: int = 1

    @cached_property
    def weights(self) -> int:
        """Bytes of weights and head that a decode step reads."""
        return self.facts.step_bytes

    @cached_property
    def _row(self) -> int:
        """Bytes of a token in one layer, all KV heads."""
        return self.facts.shape.kv_heads * self.facts.shape.row_bytes

    def decode(self, lengths: Sequence[int], offloaded: int) -> StepTime:
        """One token of each of some requests of these lengths, with the KV of so many layers on the host.

        Weights and head are read once, the head's keys of all tokens, windows, states, and the selected rows of all layers whose
        KV grows. Those of offloaded layers that the last step did not select come over the bus beside the layers before; the last
        block's layers wait for their loads. A block that is away in part takes as long to read as a whole one.
        """
        machine, shape, requests = self.machine, self.facts.shape, len(lengths)
        tokens = sum(lengths)
        chosen = longer = tokens
        counts = Counter(lengths).items()  # plans ask for many that are alike
        near = sum(count * shape.near_bytes(length) for length, count in counts) if shape.windows_read or shape.states else 0
        if self.budget is not None:
            chosen = sum(count * min(length, self.budget) for length, count in counts)
            longer = sum(count * self.budget for length, count in counts if length > self.budget)
        missed = 1.0 if self.budget is None else 1 - self.overlap
        keys = 0 if self.budget is None else tokens * self.facts.key_bytes_per_token
        missing = longer * offloaded * missed  # rows of all heads
        head = self.facts.head.parameters - self.facts.head.lookup_parameters
        parameters = self.facts.parameters - self.facts.lookup_parameters + head
        products = 2 * parameters * requests / machine.products
        read = self.weights / machine.device / (ONE_TOKEN if requests == 1 else SEVERAL_TOKENS)
        share = ALL_ROWS if self.budget is None else ROWS
        rows = (keys + (chosen * shape.reads + missing) * self._row) / machine.device / share
        rows += near / machine.device / ALL_ROWS
        launches = (
            shape.depth * machine.layer_s + offloaded * machine.offloaded_s + machine.step_s + self._between_ranks(requests)
        )
        compute = max(read, products) + rows + max(0.0, launches + self.extra_s)
        if not missing:
            return StepTime(compute, compute, 0.0)
        # Loads begin when the rows are chosen, and the layers of the last block are computed when theirs have come.
        choosing = keys / machine.device / share + machine.step_s
        last = min(self.facts.layer_blocks.places, offloaded) / shape.depth * compute
        piece = self.facts.layer_blocks.read_bytes(offloaded, shape.on_host.row_bytes, machine.piece)
        bus = longer * missed * shape.kv_heads * piece / machine.host / LOADS
        compute += requests * PLANNED_S + BESIDE * bus
        loads = choosing + self.bus * bus + last
        return StepTime(max(compute, loads), compute, loads, self.bus * bus)

    def _between_ranks(self, requests: int) -> float:
        """Seconds in which ranks sum what their layers make, twice a layer, and gather logits."""
        if self.ranks == 1:
            return 0.0
        shape = self.facts.shape
        hidden = requests * shape.hidden_size * shape.dtype.itemsize
        return 2 * shape.depth * (SUM_S + hidden / BETWEEN_RANKS) + requests * shape.vocab_size * LOGIT / BETWEEN_RANKS

    def fitted(self, lengths: Sequence[int], offloaded: int, seconds: float) -> StepClock:
        """The clock that expects a step to take what it took: what limits it takes as long, and nothing longer."""
        clock, step = self, self.decode(lengths, offloaded)
        limited = step.loads_limit
        if not limited or step.compute_s > seconds:
            extra = min(MOST_EXTRA_S, max(-MOST_EXTRA_S, self.extra_s + seconds - step.compute_s))
            clock = replace(clock, extra_s=extra)
            step = clock.decode(lengths, offloaded)
        if step.bus_s and (limited or step.loads_s > seconds):
            bus = clock.bus * (1 + (seconds - step.loads_s) / step.bus_s)
            clock = replace(clock, bus=min(MOST_BUS, max(1 / MOST_BUS, bus)))
        return clock

    def chunk_s(self, tokens: int, before: int = 0) -> float:
        """Seconds that a chunk of a prompt adds to a step, behind `before` tokens of it that are computed: products of all
        weights, and causal attention."""
        shape = self.facts.shape
        linear = 2 * (self.facts.parameters - self.facts.lookup_parameters) * tokens
        attention = 4 * shape.reads * shape.query_heads * shape.made_dim * tokens * (before + tokens / 2)
        return (linear + attention) / (PRODUCTS * self.machine.products)

    def prefill_s(self, length: int, chunk: int) -> float:
        """Seconds until a prompt of this length is computed by itself, in chunks."""
        overhead = self.facts.shape.depth * self.machine.layer_s + self.machine.step_s
        read = self.weights / self.machine.device
        starts = range(0, length, chunk)
        return sum(max(self.chunk_s(min(chunk, length - start), start), read) + overhead for start in starts)

    def tokens_per_s(self, lengths: Sequence[int], offloaded: int) -> float:
        """Tokens a second of requests of these lengths."""
        return len(lengths) / self.decode(lengths, offloaded).seconds if lengths else 0.0
