"""What to analyse, and with what; checked before anything is loaded or measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specontext.config import check_seed
from specontext.errors import SpeContextError

BUDGETS = (32, 64, 128, 256, 512, 1024, 2048)
LENGTH = 4096
SHORTEST = 128  # tokens of a sequence


class AnalysisError(SpeContextError, ValueError):
    """An analysis that cannot be made as asked; the message says what would work."""


@dataclass(frozen=True)
class Settings:
    """One analysis of a retrieval head.

    Attributes:
        head: a head directory, an EAGLE-3 draft, a Hub id of either, or a model with a head of its own.
        target: 'nano', a checkpoint directory or a Hub id.
        texts: what `specontext.distill.data.open_sources` takes; the part kept from training is measured on, the rest
            calibrates.
        compare: further heads.
        length: tokens of the sequences; None takes the greatest of 4096 and its halves that model and texts can fill.
        budgets: KV entries, sinks and recent ones among them; None takes those of 32 .. 2048 that fit.
        queries: query positions of each sequence, all in its last quarter.
        sequences: measured at `length`; of longer ones fewer, down to four.
        lengths: of recall against context length; None takes powers of two from 512 on, and one and two times the
            head's trained length, as far as model and texts go; () leaves it out.
        calibration_sequences: to measure the calibrated head map on; 0 leaves that map out.
        drift_tokens: to generate with the head's selections; 0 leaves the drift of features out.
        seed: of texts, query positions and random selections.
        trust_remote_code: let code that comes with the target run.

    Raises:
        AnalysisError: values out of range.
    """

    head: str
    target: str
    texts: tuple[str, ...]
    compare: tuple[str, ...] = ()
    length: int | None = None
    budgets: tuple[int, ...] | None = None
    queries: int = 64
    sequences: int = 8
    lengths: tuple[int, ...] | None = None
    calibration_sequences: int = 4
    drift_tokens: int = 384
    sink: int = 4
    recent: int = 16
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.texts:
            raise AnalysisError("give text to measure on, for example --text corpus.txt or --text tasks")
        for name, least in (("sink", 1), ("recent", 1), ("queries", 2), ("sequences", 1)):
            self._at_least(name, getattr(self, name), least)
        check_seed(self.seed)
        self._at_least("calibration_sequences", self.calibration_sequences, 0)
        if self.drift_tokens != 0:
            self._at_least("drift_tokens", self.drift_tokens, 2)
        for length in (*(self.lengths or ()), *(() if self.length is None else (self.length,))):
            self._at_least("length", length, SHORTEST)
        if self.budgets == ():
            raise AnalysisError("give at least one budget with --budgets, for example --budgets 128,256,512")
        for budget in self.budgets or ():
            if budget <= self.always:
                raise AnalysisError(
                    f"budget {budget} must exceed sink + recent = {self.always}: raise the budget or lower --sink or --recent"
                )
        for length in self.lengths or ():
            if length // 8 <= self.always:
                raise AnalysisError(
                    f"length {length} in --lengths is too short: 1/8 of it must exceed sink + recent = {self.always}"
                )

    def _at_least(self, name: str, value: int, least: int) -> None:
        if value < least:
            raise AnalysisError(f"{name} must be at least {least}, got {value}")

    @property
    def always(self) -> int:
        """Entries that every selection reads whatever the scores: sinks and recent tokens."""
        return self.sink + self.recent

    def budgets_for(self, length: int) -> tuple[int, ...]:
        """The budgets that are less than the length, ascending; with a greater one everything is read and all numbers are 1.

        Raises:
            AnalysisError: none does.
        """
        fitting = tuple(sorted({b for b in self.budgets or BUDGETS if self.always < b < length}))
        if not fitting:
            raise AnalysisError(f"no budget is left between sink + recent = {self.always} and the length of {length} tokens")
        return fitting

    def check_lengths(self, longest: int) -> None:
        """Raises AnalysisError for a length beyond the model's maximum of `longest` tokens."""
        for option, lengths in (("--length", () if self.length is None else (self.length,)), ("--lengths", self.lengths or ())):
            for length in lengths:
                if length > longest:
                    raise AnalysisError(f"{option} {length} exceeds the model's maximum of {longest} tokens")

    def command(self) -> str:
        """The command line of these settings; of absolute paths only the last name."""
        words = ["specontext", "head", "analyze", shown(self.head), "--target", shown(self.target)]
        for option, values in (("--text", self.texts), ("--compare", self.compare)):
            for value in values:
                words += [option, shown(value)]
        for name in ("length", "budgets", "lengths"):
            given = getattr(self, name)
            if given is not None:
                words += [f"--{name}", str(given) if isinstance(given, int) else ",".join(map(str, given)) or "none"]
        for name in (
            "queries",
            "sequences",
            "calibration_sequences",
            "drift_tokens",
            "sink",
            "recent",
            "seed",
            "device",
            "dtype",
        ):
            if getattr(self, name) != getattr(type(self), name):
                words += ["--" + name.replace("_", "-"), str(getattr(self, name))]
        words += ["--trust-remote-code"] * self.trust_remote_code
        return " ".join([*words, "-o", "DIR"])


def shown(source: str | Path) -> str:
    """How a report names a model, head or text: an absolute path by its last name, anything else as it was given."""
    path = Path(source)
    return path.name if path.is_absolute() or str(source).startswith("~") else str(source)
