"""Train a retrieval head on what its target attends to, on what it says, or on both; stopped runs continue exactly.

Of all states of the student that were measured on held-out text, the one is kept with which the target loses least: the lowest
KL divergence of its output under the head's selections. Where several lose alike, the one that was trained longest.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from specontext.checkpoints.wording import in_one_sentence
from specontext.distill.data.source import Source
from specontext.distill.settings import DistillConfig
from specontext.distill.student import Student, weighted
from specontext.distill.target import Target
from specontext.errors import SpeContextError

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
CRITERION = "kl_divergence"  # of what `evaluate` measures: the lower, the better is the head
ALIKE = 0.02, 2e-4  # a head that was trained longer is kept although it measures worse by this share, or by so many nats


@dataclass(frozen=True, eq=False)
class Best:
    """The student as it was when the target lost least.

    Attributes:
        step: steps that it was trained for.
        value: `CRITERION` there.
        lowest: `CRITERION` where it was lowest; what differs from it by no more than `ALIKE` is the noise of a few windows.
        state: its parameters, on the CPU.
    """

    step: int
    value: float
    lowest: float
    state: dict[str, Tensor]


@dataclass(eq=False)
class Progress:
    """Where a training stands."""

    step: int = 0
    best: Best | None = None

    def see(self, student: Student, value: float | None) -> None:
        """Keep the student if none before was clearly better."""
        if value is None or not math.isfinite(value):
            return
        lowest = value if self.best is None else min(value, self.best.lowest)
        if value <= max(lowest * (1 + ALIKE[0]), lowest + ALIKE[1]):
            state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in student.state_dict().items()}
            self.best = Best(self.step, value, lowest, state)


def learning_rate(config: DistillConfig, step: int) -> float:
    """In each phase linear warm-up, then a cosine to zero."""
    loop = step >= config.steps
    highest, steps = (config.loop_learning_rate, config.loop_steps) if loop else (config.learning_rate, config.steps)
    step -= config.steps * loop
    return highest * min(1.0, (step + 1) / max(1, config.warmup)) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


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
) -> Best | None:
    """Train `student` in place, continuing from `run/checkpoint.pt` where there is one; progress goes to `run/log.jsonl`.

    At its end the student is as it was when `evaluate` gave the lowest `CRITERION`, or later where that was as low (`ALIKE`); as
    the last step left it where that was never measured, and with the output objective alone, which does not train for it.

    Args:
        evaluate: further entries for the log every `config.measure_every` steps and at the end of each phase.
        report: called with every row of the log.
        until: stop after this step instead of the last, for continuing later.

    Returns:
        what was kept, None for the last state.

    Raises:
        SpeContextError: the checkpoint is of another training or cannot be written, or the loss is not a number any more.
    """
    with written(run):
        run.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in student.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, (0.9, 0.98), weight_decay=config.weight_decay)
    progress = load_checkpoint(run / CHECKPOINT, student, optimizer, config)
    end = config.total_steps if until is None else until
    while progress.step < end:
        began, step = time.perf_counter(), progress.step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        with _kept_if_it_fails(lambda: save_checkpoint(run / CHECKPOINT, student, optimizer, config, progress)):
            losses, length = add_gradients(student, target, source, config, step)
        norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
        if not math.isfinite(norm):
            raise SpeContextError(
                f"the gradient is not a finite number at step {step}: begin again in another directory, with a lower "
                "learning_rate"
            )
        optimizer.step()
        progress.step = step = step + 1
        row: dict[str, float] = {"step": step, "length": length}
        row |= {name: round(value, 4) for name, value in losses.items()}
        row["seconds"] = round(time.perf_counter() - began, 2)
        if evaluate is not None and (step % config.measure_every == 0 or step in (config.steps, config.total_steps)):
            measured = evaluate()
            row |= measured
            if config.attends:
                progress.see(student, measured.get(CRITERION))
        with written(run / LOG), (run / LOG).open("a") as log:
            print(json.dumps(row), file=log)
        if report is not None:
            report(row)
        if step % config.save_every == 0 or step == end:
            save_checkpoint(run / CHECKPOINT, student, optimizer, config, progress)
    if progress.best is not None and progress.step == config.total_steps:
        student.load_state_dict(progress.best.state)
    student.eval().requires_grad_(False)
    return progress.best


def add_gradients(
    student: Student, target: Target, source: Source, config: DistillConfig, step: int
) -> tuple[dict[str, float], int]:
    """Add the gradients of all batches of a step; the means of its losses, and the length of its last batch."""
    losses: dict[str, float] = {}
    length = 0
    for index in range(step * config.accumulate, (step + 1) * config.accumulate):
        batch = draw_batch(source, config, index)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            found = student.losses(target, batch, config, index, loop=step >= config.steps)
        (weighted(found, config) / config.accumulate).backward()
        for name, value in found.items():
            losses[name] = losses.get(name, 0.0) + value.item() / config.accumulate
        length = batch[0].shape[1]
    return losses, length


def save_checkpoint(
    path: Path, student: Student, optimizer: torch.optim.Optimizer, config: DistillConfig, progress: Progress
) -> None:
    """Write the checkpoint so that a stop in the middle leaves the former one."""
    state = {
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": asdict(config),
        "step": progress.step,
    }
    if progress.best is not None:
        state["best"] = vars(progress.best)
    draft = path.with_suffix(".new")
    with written(path):
        try:
            torch.save(state, draft)
            draft.replace(path)
        except RuntimeError as error:  # in which torch wraps what the system said, as far as it knows
            raise OSError(f"torch says '{in_one_sentence(error)}'") from error
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def _kept_if_it_fails(save: Callable[[], None]) -> Iterator[None]:
    """Saves the steps so far where something a user can mend, such as a row of the data, ends the next one."""
    try:
        yield
    except SpeContextError:
        with suppress(SpeContextError):  # a full disk is not what ended it
            save()
        raise


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Raises SpeContextError, which says what to do, where a file or directory of a training cannot be written inside."""
    try:
        yield
    except OSError as error:
        raise SpeContextError(
            f"{path} cannot be written: {error.strerror or error}; make room and resume, or choose another directory"
        ) from error


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer, config: DistillConfig) -> Progress:
    """Restore a stopped training; its beginning where there is no checkpoint.

    Raises:
        SpeContextError: it is broken, or of a training with other settings; the message names them.
    """
    if not path.exists():
        return Progress()
    try:
        saved = torch.load(path, weights_only=True, map_location=next(student.parameters()).device)
        before, now = saved["config"], asdict(config)
        if changed := sorted(name for name in now if before.get(name) != now[name]):
            raise SpeContextError(
                f"{path} is of a training with other settings ({', '.join(changed)}): resume it with the same ones, "
                "or choose another directory"
            )
        progress = Progress(int(saved["step"]))
        if "best" in saved:
            best = saved["best"]
            progress.best = Best(int(best["step"]), float(best["value"]), float(best["lowest"]), best["state"])
            student.load_state_dict(progress.best.state)  # that it fits is to be known before the last step
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        if not 0 <= progress.step <= config.total_steps:
            raise ValueError(f"it is of step {progress.step}, and the training has {config.total_steps}")
        return progress
    except SpeContextError:
        raise
    except Exception as error:  # a broken pickle fails in any way
        raise SpeContextError(
            f"cannot resume from {path} ({in_one_sentence(error)}): begin again in another directory"
        ) from error
