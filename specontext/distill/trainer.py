"""Train a retrieval head on what its target attends to, on what it says, or on both; stopped runs continue exactly."""

from __future__ import annotations

import json
import math
import pickle
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from specontext.checkpoints.wording import in_one_sentence
from specontext.config import ConfigError
from specontext.core import SpeContextError
from specontext.distill.attention import Pool, Teacher, attention_loss, head_log_weights, map_of
from specontext.distill.data.source import Source
from specontext.distill.draft import Draft
from specontext.distill.queries import candidates, sample_rows
from specontext.distill.target import Target
from specontext.retrieval.head import RetrievalHead

OBJECTIVES = ("attention", "output", "both")
PRECISIONS = ("float32", "bfloat16")
CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass(frozen=True)
class DistillConfig:
    """Settings of one training.

    Attributes:
        objective: 'attention' (KL to the target's attention), 'output' (EAGLE-3's: soft cross-entropy of a whole draft against
            the target's next-token distribution) or 'both', the sum.
        lengths: lengths of sequences in tokens with their shares; each step draws one.
        tokens_per_step: tokens of one step; a sequence longer than that is a step of its own.
        accumulate: batches whose gradients make one step.
        precision: number format of matrix products, target and head alike; parameters and losses stay in float32.
        queries: query positions sampled of each sequence for the attention objective; `random_share` of them anywhere, the
            others where an answer is wanted.
        sink, recent: first and last tokens that every selection keeps (the query's own among the recent ones).
        teacher_pool: pooling of the target's probabilities over a group. 'max' keeps what any head needs, 'mean' is the
            average that attention recall measures.
        student_pool: pooling of the head's weights in the loss; selection always takes the maximum.
        unroll_steps, unroll_decay: steps of EAGLE-3's training-time test, and the weight of each against the one before.
        output_weight: weight of the output loss where both are trained.
        measure_every, save_every: steps between measurements of recall, and between checkpoints.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int
    objective: str = "attention"
    lengths: tuple[tuple[int, float], ...] = ((2048, 1.0),)
    tokens_per_step: int = 16384
    accumulate: int = 1
    precision: str = "float32"
    learning_rate: float = 4e-3
    warmup: int = 30
    weight_decay: float = 0.01
    clip: float = 1.0
    queries: int = 256
    random_share: float = 0.1
    sink: int = 4
    recent: int = 16
    teacher_pool: Pool = "max"
    student_pool: Pool = "max"
    unroll_steps: int = 7
    unroll_decay: float = 0.8
    output_weight: float = 1.0
    measure_every: int = 100
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("objective", self.objective, OBJECTIVES), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise ConfigError(f"unknown {name} '{value}': choose one of {', '.join(known)}")
        for name in ("steps", "tokens_per_step", "accumulate", "queries", "unroll_steps", "measure_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be above 0, got {self.learning_rate}")
        if any(length <= self.sink + self.recent for length, _ in self.lengths):
            raise ConfigError(f"sequences must be longer than sink + recent = {self.sink + self.recent} tokens")

    @property
    def attends(self) -> bool:
        return self.objective in ("attention", "both")

    @property
    def speaks(self) -> bool:
        return self.objective in ("output", "both")


class Student(nn.Module):
    """What is trained: the head, and the draft around it where the output objective needs one."""

    def __init__(self, head: RetrievalHead, draft: Draft | None = None) -> None:
        super().__init__()
        self.head = head
        self.draft = draft

    def losses(self, target: Target, batch: tuple[Tensor, Tensor], config: DistillConfig, step: int) -> dict[str, Tensor]:
        """Losses of one batch, by objective.

        Args:
            batch: token ids [N, S] and the mask [N, S] of positions whose next token the target has to say.
        """
        ids, wanted = (tensor.to(target.device) for tensor in batch)
        found: dict[str, Tensor] = {}
        if config.attends:
            rows, real = sample_rows(wanted, config.queries, config.random_share, generator_of(config.seed, step))
            head_map = map_of(self.head.config, target.layers, target.groups)
            teacher = Teacher(head_map, self.head.config.kv_heads, config.teacher_pool)
            seen = target.observe(ids, rows, teacher)
            far, _ = candidates(rows, ids.shape[1], config.sink, config.recent)
            student = head_log_weights(self.head, seen, rows, far, config.student_pool)
            found["attention"] = attention_loss(student, teacher.weights, far, real)
        else:
            seen = target.observe(ids)
        if config.speaks:
            assert self.draft is not None
            loss, agreement = self.draft.loss(
                seen.embedded(self.head),
                seen.features,
                seen.hidden,
                target.output_matrix,
                wanted,
                steps=config.unroll_steps,
                decay=config.unroll_decay,
            )
            found["output"] = loss
            found["agreement"] = torch.tensor(agreement[0])
        return found


def generator_of(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate(config: DistillConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    done = step / max(1, config.steps)
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup)) * 0.5 * (1 + math.cos(math.pi * done))


def size_of(config: DistillConfig, index: int) -> tuple[int, int]:
    """Length, drawn from (seed, index), and number of the sequences of batch `index`."""
    lengths, shares = zip(*config.lengths, strict=True)
    length: int = random.Random(f"length/{config.seed}/{index}").choices(lengths, shares)[0]
    return length, max(1, config.tokens_per_step // config.accumulate // length)


def draw_batch(source: Source, config: DistillConfig, index: int) -> tuple[Tensor, Tensor]:
    """Batch `index` of a training."""
    sequences = source.draw(index, *size_of(config, index))
    return sequences.ids, sequences.wanted


def train(
    student: Student,
    target: Target,
    source: Source,
    config: DistillConfig,
    run: Path,
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    until: int | None = None,
) -> None:
    """Train `student` in place, continuing from `run/checkpoint.pt` where there is one; progress goes to `run/log.jsonl`.

    Args:
        evaluate: further entries for the log every `config.measure_every` steps and at the end.
        report: called with every row of the log.
        until: stop after this step instead of `config.steps`, for continuing later.

    Raises:
        SpeContextError: the checkpoint is of another training, or the loss is not a number any more.
    """
    run.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in student.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, (0.9, 0.98), weight_decay=config.weight_decay)
    step, end = load_checkpoint(run / CHECKPOINT, student, optimizer, config), config.steps if until is None else until
    low = torch.autocast(target.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    while step < end:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        sums: dict[str, float] = {}
        for part in range(config.accumulate):
            index = step * config.accumulate + part
            batch = draw_batch(source, config, index)
            with low:
                found = student.losses(target, batch, config, index)
            loss = found.get("attention", 0.0) + config.output_weight * found.get("output", 0.0)
            assert isinstance(loss, Tensor)
            (loss / config.accumulate).backward()
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.item() / config.accumulate
        norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
        if not math.isfinite(norm):
            raise SpeContextError(f"the gradient is not a finite number at step {step}: lower learning_rate and resume")
        optimizer.step()
        step += 1
        row: dict[str, float] = {"step": step, "length": batch[0].shape[1]}
        row |= {name: round(value, 4) for name, value in sums.items()}
        row["seconds"] = round(time.perf_counter() - began, 2)
        if evaluate is not None and (step % config.measure_every == 0 or step == config.steps):
            row |= evaluate()
        with (run / LOG).open("a") as log:
            print(json.dumps(row), file=log)
        if report is not None:
            report(row)
        if step % config.save_every == 0 or step == end:
            save_checkpoint(run / CHECKPOINT, student, optimizer, config, step)
    student.eval().requires_grad_(False)


def save_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer, config: DistillConfig, step: int) -> None:
    """Write the checkpoint so that a stop in the middle leaves the former one."""
    state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "config": asdict(config), "step": step}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer, config: DistillConfig) -> int:
    """Restore a stopped training and return its step; 0 where there is no checkpoint.

    Raises:
        SpeContextError: it is broken, or of a training with other settings; the message names them.
    """
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, weights_only=True, map_location=next(student.parameters()).device)
        before, now = saved["config"], asdict(config)
        if changed := sorted(name for name in now if before.get(name) != now[name]):
            raise SpeContextError(
                f"{path} is of a training with other settings ({', '.join(changed)}): resume it with the same ones, "
                "or choose another directory"
            )
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])
    except (LookupError, RuntimeError, ValueError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise SpeContextError(f"cannot resume from {path}: {in_one_sentence(error)}") from error
