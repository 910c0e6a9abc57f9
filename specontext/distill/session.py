"""From a target's name to a trained head: the parts of one distillation, put together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specontext.checkpoints.files import read_json
from specontext.config import SpeContextConfig
from specontext.distill.data import Mixed, OnPolicy, Source, open_sources
from specontext.distill.data.mixing import sizes_of_share
from specontext.distill.draft import Draft, frequent_tokens
from specontext.distill.draft_files import check_draft_place, check_form, save_draft
from specontext.distill.held_out import HeldOut
from specontext.distill.new_head import HeadShape, new_head, standard_shape
from specontext.distill.settings import DistillConfig
from specontext.distill.student import Student
from specontext.distill.target import Target
from specontext.distill.trainer import CHECKPOINT, size_of, train, written
from specontext.engine.llm import LLM
from specontext.engine.start import pick_device
from specontext.errors import ConfigError, shown
from specontext.memory.facts import feed_forward_width
from specontext.model_shape import ModelShape
from specontext.models.loading import LoadedModel, load_model
from specontext.models.rope import fix_rope
from specontext.retrieval.checkpoint import check_place, load_head, save_head
from specontext.sampling_params import SamplingParams

SETTINGS = "training.json"
DRAFT = "draft"
# What a training is a function of beside its `DistillConfig`, which its checkpoint holds.
RESUMED = ("target", "data", "length", "shape", "start", "on_policy", "temperature", "draft_vocabulary", "dtype")
SHARES = (0.5, 0.25, 0.15, 0.1)  # of the longest sequences, of half as long ones, ...
SHORTEST = 256
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def mixed_lengths(longest: int) -> tuple[tuple[int, float], ...]:
    """Half of the sequences as long as the longest, the others 1/2, 1/4 and 1/8 of it: one length alone forgets the others."""
    lengths = [longest, *(longest // 2**i for i in (1, 2, 3) if longest // 2**i >= SHORTEST)]
    return tuple(zip(lengths, SHARES, strict=False))


@dataclass(frozen=True)
class Session:
    """One distillation.

    Attributes:
        target: 'nano', a checkpoint directory or a Hub id.
        data: where sequences come from, see `specontext.distill.data.open_sources`.
        length: longest sequences, in tokens; the head's `trained_length`.
        shape: form of a new head; None takes `standard_shape`, or EAGLE-3's where a draft is trained around it. Without effect
            when `start` names a head.
        start: head directory or EAGLE-3 draft to go on from; None starts from random weights.
        on_policy: share of the sequences whose answers the target generates itself.
        temperature: of these generations.
        yarn: whether contexts beyond the trained length will be served by YaRN.
        draft_vocabulary: tokens that the draft of the output objective can predict, None for all.
        save_dtype: number format of the matrices in the head's file.
        trust_remote_code: let code that comes with the target run.
    """

    target: str
    out: Path
    data: tuple[str, ...]
    config: DistillConfig
    length: int = 4096
    shape: HeadShape | None = None
    start: str | None = None
    on_policy: float = 0.0
    temperature: float = 1.0
    draft_vocabulary: int | None = None
    recommended_budget: int | None = None
    yarn: bool = True
    dtype: str = "auto"
    device: str = "auto"
    save_dtype: str = "float32"
    trust_remote_code: bool = False

    def run(self, *, resume: bool = False, report: Callable[[dict[str, float]], None] | None = None) -> dict[str, float]:
        """Train and write the head to `out`; with an output objective also the whole draft, to `out/draft`.

        Args:
            resume: go on with the training that was stopped in `out`; without it a started training there is an error.

        Returns:
            what was measured on held-out text with the head that was written, as of `HeldOut.judge`, and `kept_step`, the steps
            that it was trained for.

        Raises:
            SpeContextError: settings, data or checkpoints that do not fit.
        """
        self._check(resume)
        with _folder_for(self.out):  # whether there is one is to be known before anything large is loaded
            return self._run(report)

    def _run(self, report: Callable[[dict[str, float]], None] | None) -> dict[str, float]:
        device = pick_device(self.device)
        loaded = load_model(self.target, dtype=self.dtype, device=device, trust_remote_code=self.trust_remote_code)
        shape = loaded.shape
        if self.length > shape.reach:
            raise ConfigError(f"length {self.length} exceeds the model's maximum of {shape.longest}")
        if shape.only_windows:
            raise ConfigError("all layers of the target have a window: no head can be of use to it, and none needs to be trained")
        fix_rope(loaded.model, max(self.length, shape.max_position))
        source = self._source(loaded)
        student = self._student(loaded.model, shape, source)
        student.to(device)
        target = Target(loaded.model, student.head.config.feature_layers)
        held_out = HeldOut(target, self._open(loaded, held_out=True), self.length, self.config.sink, self.config.recent)
        with written(self.out):
            (self.out / SETTINGS).write_text(json.dumps(self.describe(), indent=1) + "\n")
        best = train(
            student,
            target,
            source,
            self.config,
            self.out,
            evaluate=lambda: held_out.judge(student.head, rounds=2),
            report=report,
        )
        save_head(student.head, self.out, FORMATS[self.save_dtype])
        if student.draft is not None:
            save_draft(student.draft, self.out / DRAFT)
        kept = self.config.total_steps if best is None else best.step
        return {"kept_step": kept} | held_out.judge(student.head, rounds=4)

    def describe(self) -> dict[str, object]:
        """The settings, for the log; paths as they were given."""
        return asdict(replace(self, out=Path(self.out.name))) | {"out": self.out.name}

    def _check(self, resume: bool) -> None:
        if self.save_dtype not in FORMATS:
            raise ConfigError(f"unknown number format '{self.save_dtype}' of the head: choose one of {', '.join(FORMATS)}")
        check_place(self.out)
        started = (self.out / CHECKPOINT).exists()
        if started and not resume:
            raise ConfigError(f"{self.out} holds a started training: add --resume to go on with it, or choose another directory")
        if resume and not started:
            raise ConfigError(f"there is no training to resume in {self.out}: it has no {CHECKPOINT}")
        if resume:
            self._check_same()
        least = self.config.sink + self.config.recent + 1
        if self.recommended_budget is not None and self.recommended_budget < least:
            raise ConfigError(
                f"recommended_budget {self.recommended_budget} has no room beside sinks and recent tokens: {least} is the least"
            )
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(f"on_policy is a share from 0 to 1, got {self.on_policy}")
        SamplingParams(temperature=self.temperature)  # says what is wrong with it before anything is generated
        if self.config.speaks and self.shape is not None and self.shape.variant != "features":
            raise ConfigError("the output objective trains an EAGLE-3 draft, which reads features: choose --variant features")
        if self.config.speaks:
            check_draft_place(self.out / DRAFT)

    def _check_same(self) -> None:
        """Raises ConfigError where the training that is resumed is another one than these settings make."""
        before = read_json(self.out / SETTINGS, ConfigError)
        now = json.loads(json.dumps(self.describe()))
        if changed := [name for name in RESUMED if before.get(name) != now[name]]:
            said = ", ".join(f"{name} {shown(before.get(name))} instead of {shown(now[name])}" for name in changed)
            raise ConfigError(
                f"{self.out} holds a training with other settings ({said}): resume it with the same ones, or choose "
                "another directory"
            )

    def _open(self, loaded: LoadedModel, *, held_out: bool) -> Source:
        return open_sources(
            self.data,
            tokenizer=loaded.tokenizer,
            seed=self.config.seed,
            held_out=held_out,
            vocab_size=loaded.shape.vocab_size,
        )

    def _source(self, loaded: LoadedModel) -> Source:
        source = self._open(loaded, held_out=False)
        if not self.on_policy:
            return source
        llm = LLM(loaded, None, SpeContextConfig(method="full"), max_model_len=self.length, max_num_batched_tokens=4096)
        sizes = sizes_of_share(lambda index: size_of(self.config, index), self.on_policy)
        own = OnPolicy(source, llm, seed=self.config.seed, temperature=self.temperature, sizes=sizes)
        return Mixed(own, source, self.on_policy)

    def _student(self, model: PreTrainedModel, shape: ModelShape, source: Source) -> Student:
        if self.start is not None:
            head = load_head(self.start, target=shape)
            head.config = replace(head.config, trained_length=self.length)
        else:
            name = f"{self.config.objective} distillation from {Path(self.target).name} on {', '.join(self.data)}"
            form = self.shape or (HeadShape() if self.config.speaks else standard_shape(shape))
            head = new_head(form, shape, trained_length=self.length, source=name, seed=self.config.seed)
        head.config = replace(head.config, yarn=self.yarn)
        if self.recommended_budget is not None:
            head.config = replace(head.config, recommended_budget=self.recommended_budget)
        if not self.config.speaks:
            return Student(head)
        check_form(head.config)  # it is trained in vain if it cannot be written
        vocabulary = None
        if self.draft_vocabulary is not None and self.draft_vocabulary < shape.vocab_size:
            vocabulary = frequent_tokens(self._token_counts(source, shape.vocab_size), self.draft_vocabulary)
        matrix = model.get_output_embeddings().weight if head.config.hidden_size == shape.hidden_size else None
        width = feed_forward_width(model.config, shape)
        return Student(head, Draft(head, intermediate_size=width, vocabulary=vocabulary, lm_head=matrix))

    def _token_counts(self, source: Source, size: int) -> Tensor:
        """How often each token stands in some fifty batches."""
        counts = torch.zeros(size, dtype=torch.int64)
        for step in range(50):
            sequences = source.draw(step, self.length, 1)
            real = torch.arange(sequences.ids.shape[1]) < sequences.lengths[:, None]
            counts += sequences.ids[real].bincount(minlength=size)
        return counts


def sequences_of(source: Source, *, length: int, rows: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and wanted marks of about `count` sequences."""
    for step in range(-(-count // rows)):
        sequences = source.draw(step, length, rows)
        yield sequences.ids, sequences.wanted


def parse_layers(text: str) -> tuple[int, ...]:
    """Feature layers from `2,16,29`.

    Raises:
        ConfigError: not a list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"feature layers are whole numbers with commas, such as 2,16,29; got '{text}'") from error


@contextmanager
def _folder_for(results: Path) -> Iterator[None]:
    """Make a folder; if it is still empty when something fails inside, it goes again."""
    made = not results.exists()
    with written(results):
        results.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                results.rmdir()
        raise
