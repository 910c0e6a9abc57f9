"""The parts of a reproduction: which commands each is made of, and what lies on the disk when a command is done."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specontext.memory.facts import ModelFacts
from specontext.memory.model import MemoryModel, RunSettings, fitting_step, measured_model
from specontext.retrieval.catalog import KNOWN_DRAFTS

REPOSITORY = Path(__file__).resolve().parent.parent
_NEAR = Path(os.path.relpath(REPOSITORY)) if Path.cwd().is_relative_to(REPOSITORY) else REPOSITORY
TEXTS = (str(_NEAR / "docs"), str(_NEAR / "specontext" / "engine"))
PARTS = ("head", "validate", "ruler", "longbench", "aime")
VALIDATE = "scripts/validate_real_model"
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
LONGBENCH_LENGTH, AIME_LENGTH = 32768, 32768  # tokens, prompt and answer together
AIMES = ("aime24", "aime25")
DISTILL_LENGTH, DISTILL_STEPS, DISTILL_TOKENS = 8192, 2000, 16384  # tokens of the longest sequences and of a step
CALIBRATION_TOKENS = 16 * 4096  # of `specontext head calibrate`


@dataclass(frozen=True)
class Command:
    """One command as a person would type it.

    Attributes:
        results: files that are there when it is done.
        unfinished, resume: what is added to the words where this file of a stopped run is there.
    """

    words: tuple[str, ...]
    results: tuple[Path, ...]
    unfinished: Path | None = None
    resume: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Part:
    """Commands that run one after another.

    Attributes:
        steps: of each the first alternative that works is taken; the others are for when it fails.
        notes: what the part leaves out, and why.
    """

    name: str
    steps: tuple[tuple[Command, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is asked for, and the model that it is asked of.

    Attributes:
        gpu_memory: bytes that KV and weights may take.
    """

    asked: argparse.Namespace
    facts: ModelFacts
    gpu_memory: int

    @property
    def head(self) -> str:
        """What `--retrieval-head` is told."""
        if self.asked.retrieval_head:
            return str(self.asked.retrieval_head)
        return str(self.head_folder) if self.asked.distill or self.drafts else "auto"

    @property
    def head_folder(self) -> Path:
        return Path(self.asked.out) / "head"

    @property
    def drafts(self) -> tuple[str, ...]:
        """Drafts on the Hub of a model that is called so, whether by its id or by a directory of that name."""
        name = Path(self.asked.model).name
        return next((drafts for model, drafts in KNOWN_DRAFTS.items() if Path(model).name == name), ())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Contexts that the model can have."""
        return tuple(length for length in self.asked.lengths if length <= self.facts.shape.max_position)

    def fitted(self, length: int) -> int:
        return min(length, self.facts.shape.max_position)

    def parts(self) -> list[Part]:
        made = {"head": self._head, "validate": self._validate, "ruler": self._ruler}
        made |= {"longbench": self._longbench, "aime": self._aime}
        return [made[name]() for name in PARTS if name in self.asked.parts]

    def _machine(self) -> Iterator[str]:
        for name in ("device", "dtype"):
            if getattr(self.asked, name) != "auto":
                yield from (f"--{name}", getattr(self.asked, name))

    def _head(self) -> Part:
        asked, folder = self.asked, self.head_folder
        weights = (folder / "config.json", folder / "model.safetensors")
        if asked.retrieval_head:
            return Part("head", (), (f"{asked.retrieval_head} is taken as it is.",))
        if asked.distill:
            words = ["specontext", "distill", asked.model, "-o", str(folder), "--steps", str(asked.distill_steps)]
            words += ["--tokens-per-step", str(asked.distill_tokens)]
            words += ["--length", str(self.fitted(asked.distill_length)), *self._machine()]
            words += ["--precision", "bfloat16"] if self.facts.shape.dtype.itemsize == 2 and asked.device != "cpu" else []
            words += [word for data in asked.distill for word in ("--data", data)]
            return Part("head", ((Command(tuple(words), weights, folder / "checkpoint.pt", ("--resume",)),),))
        if not self.drafts:
            return Part("head", (), ("no draft of this model is known: its own head is taken, or name one, or --distill DATA.",))
        prune = ("specontext", "head", "prune")
        texts = tuple(word for text in asked.text for word in ("--text", text))
        calibrate = ("specontext", "head", "calibrate", str(folder), "--target", asked.model, *texts, *self._machine())
        return Part(
            "head",
            (
                tuple(Command((*prune, draft, "--target", asked.model, "-o", str(folder)), weights) for draft in self.drafts),
                (Command((*calibrate, "--json"), weights),),
            ),
        )

    def _validate(self) -> Part:
        asked, folder = self.asked, Path(self.asked.out) / "validate"
        words = [VALIDATE, asked.model, "--retrieval-head", self.head, "-o", str(folder), *self._machine()]
        words += [word for text in ("tasks", *asked.text) for word in ("--text", text)]
        words += ["--lengths", ",".join(map(str, self.validated))]
        words += ["--budgets", ",".join(map(str, self.budgets(min(self.validated))))]
        words += ["--quick"] if asked.quick else []
        words += ["--problems", str(asked.limit), "--windows", str(asked.limit)] if asked.limit else []
        return Part("validate", ((Command(tuple(words), (folder / "summary.md",)),),))

    @property
    def validated(self) -> tuple[int, ...]:
        """Of the contexts the least, one in the middle and the longest of at most 32K, where fidelity and times are measured."""
        some = [length for length in self.lengths if length <= LENGTHS[3]] or list(self.lengths[:1])
        return tuple(dict.fromkeys((some[0], some[len(some) // 2], some[-1])))

    def budgets(self, length: int) -> tuple[int, ...]:
        """Those that leave something out of a context; half of it where none does."""
        return tuple(budget for budget in self.asked.budgets if budget < length) or (length // 2,)

    def _evaluation(self, suite: str, folder: Path, length: int, *more: str, limit: int) -> Command:
        asked = self.asked
        words = ["specontext", "eval", asked.model, "--suite", suite, "-o", str(folder), "--retrieval-head", self.head]
        words += ["--methods", ",".join(asked.methods), "--budgets", ",".join(map(str, self.budgets(length)))]
        words += ["--max-model-len", str(length), "--limit", str(limit), "--skip-unsupported", *self._machine()]
        words += ["--offload-layers", "-1"] if self.resident_bytes(length) > self.gpu_memory else []
        return Command((*words, *more), (folder / "results.json", folder / "report.md"))

    def memory(self, length: int, requests: int) -> MemoryModel:
        """What an engine for so many requests of this length allocates, with steps as long as it takes in this memory."""
        budget = min(self.asked.budgets[-1], length)
        run = fitting_step(self.facts, RunSettings(requests, length, budget, budget), self.gpu_memory)
        return measured_model(self.facts, run, spare_layers=0)

    def resident_bytes(self, length: int) -> int:
        """Device bytes of one request of this length, all its KV on the device."""
        return self.memory(length, 1).device(length, 1, 0)

    def _ruler(self) -> Part:
        limit = self.asked.limit or 50
        steps = tuple(
            (self._evaluation("ruler", Path(self.asked.out) / f"ruler-{n}", n, "--lengths", str(n), limit=limit),)
            for n in self.lengths
        )
        beyond = [n for n in self.asked.lengths if n not in self.lengths]
        most = f"the model's contexts end at {self.facts.shape.max_position:,} tokens"
        return Part("ruler", steps, (f"without {', '.join(f'{n:,}' for n in beyond)}: {most}.",) if beyond else ())

    def _longbench(self) -> Part:
        asked, folder = self.asked, Path(self.asked.out) / "longbench"
        data = ("--data", asked.longbench_data) if asked.longbench_data else ()
        length = self.fitted(LONGBENCH_LENGTH)
        return Part("longbench", ((self._evaluation("longbench", folder, length, *data, limit=asked.limit or 50),),))

    def _aime(self) -> Part:
        asked, length = self.asked, self.fitted(self.asked.chain_tokens)
        steps = []
        for suite in AIMES:
            data = getattr(asked, f"{suite}_data")
            more = ("--lengths", str(length), *(("--data", data) if data else ()))
            folder = Path(asked.out) / suite
            steps.append((self._evaluation(suite, folder, length, *more, limit=asked.limit or 30),))
        return Part("aime", tuple(steps))
