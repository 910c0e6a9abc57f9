"""What the paper's tables ask for: models, columns of prompts and outputs, memory; at full size, or small enough for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

GIB = 1 << 30
K = 1024
PAPER_EAGER_REQUESTS = 4  # with which the paper runs Hugging Face's eager attention


@dataclass(frozen=True)
class Column:
    """Requests that start together, with prompts and outputs of these lengths in tokens."""

    name: str
    prompt: int
    output: int

    @property
    def slug(self) -> str:
        """Its name as a part of others, without what a shell would read."""
        return self.name.strip("[]").replace(",", "-")

    @property
    def longest(self) -> int:
        return self.prompt + self.output

    def lengths(self, points: int) -> list[int]:
        """Lengths at which a step is measured, from the first to the last, evenly spread."""
        if points == 1:
            return [self.prompt + self.output // 2]
        return [self.prompt + round(self.output * i / (points - 1)) for i in range(points)]

    def decode_seconds(self, steps: dict[int, float]) -> float:
        """Seconds of all decode steps of a request, from some steps by length (the trapezoidal rule); the prefill gives the first
        token."""
        lengths, count = sorted(steps), max(self.output - 1, 0)
        if len(lengths) == 1:
            return count * steps[lengths[0]]
        area = sum((b - a) * (steps[a] + steps[b]) / 2 for a, b in pairwise(lengths))
        return count * area / (lengths[-1] - lengths[0])


@dataclass(frozen=True)
class Scale:
    """Sizes of a run.

    Attributes:
        shrink: what lengths and budget are divided by.
        tiny: models keep their family only.
        points: lengths at which decode steps are measured.
        steps: timed steps of a point, behind `warm_up`.
        prefills: prompts that are computed to time one.
        most_requests: that are searched through.
        device_memory: bytes of the device tier of KV on a CPU; a GPU's are its own.
        budget: entries that a KV head reads.
        concurrency: requests of the curve.
    """

    name: str
    dtype: str
    shrink: int
    tiny: bool
    points: int
    warm_up: int
    steps: int
    prefills: int
    most_requests: int
    device_memory: int
    budget: int
    concurrency: tuple[int, ...]

    def column(self, name: str, prompt: int, output: int) -> Column:
        return Column(name, prompt // self.shrink, output // self.shrink)

    @property
    def slots(self) -> int:
        return self.budget + self.budget // 4

    @property
    def columns(self) -> list[Column]:
        """The paper's four."""
        sizes = {"[2k,16k]": (2, 16), "[2k,32k]": (2, 32), "[16k,2k]": (16, 2), "[32k,2k]": (32, 2)}
        return [self.column(name, prompt * K, output * K) for name, (prompt, output) in sizes.items()]

    def contexts(self, *thousands: int) -> list[Column]:
        """Columns that are one length: what is decoded there, without a prefill."""
        return [self.column(f"{count}k", count * K, 0) for count in thousands]


FULL = Scale("full", "bfloat16", 1, False, 4, 4, 12, 2, 128, 0, 2048, (1, 2, 4, 8, 16, 32, 64))
TINY = Scale("tiny", "float32", 64, True, 2, 1, 2, 1, 8, 4 << 20, 32, (1, 4))
SCALES = {scale.name: scale for scale in (FULL, TINY)}


@dataclass(frozen=True)
class TablePlan:
    """A table of the paper: whose shapes it has, and what its memory is.

    Attributes:
        memory: bytes that everything may take on the GPU; None for nearly all of it.
        requests: at once; None for as many as make the most tokens a second.
    """

    name: str
    models: tuple[str, ...]
    memory: int | None = None
    requests: int | None = None
    title: str = field(default="")


TABLES = {
    table.name: table
    for table in (
        TablePlan("cloud", ("r1-distill-llama-8b", "qwen3-8b"), title="many requests, one GPU"),
        TablePlan("single", ("llama-3.1-8b",), requests=1, title="one request by its length, decode only"),
        TablePlan("edge", ("llama-3.2-1b",), memory=4 * GIB, requests=1, title="one request, 4 GiB"),
        TablePlan("ablation", ("llama-3.1-8b",), title="what each part brings"),
        TablePlan("concurrency", ("llama-3.1-8b",), title="requests at once under the same memory, decode only"),
    )
}
