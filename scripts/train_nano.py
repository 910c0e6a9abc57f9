"""Train the bundled model `nano` on generated tasks.

Usage: python scripts/train_nano.py RUN_DIR [--device cpu] [--seed 0] [--polish MODEL_DIR]

The curriculum is a list of stages; a stage is left when the running answer accuracy of each of its tasks passes its mark,
never by the clock (a step limit only stops a stage that fails to learn). Every batch is drawn from (seed, step), so a run
that is stopped continues from `RUN_DIR/checkpoint.pt` exactly as if it had not been. `RUN_DIR/log.jsonl` keeps the losses
and accuracies, `RUN_DIR/model` the Hugging Face checkpoint. `--polish` runs the last stage alone, from the weights in MODEL_DIR
and with new optimizer moments; give it a seed of its own, so that it sees new problems.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nano_tokenizer import build as build_tokenizer
from specontext.evaluation.tasks.problem import LengthError, Problem
from specontext.evaluation.tasks.program import ProgramTask
from specontext.evaluation.tasks.retrieval import RetrievalTask
from specontext.evaluation.tasks.tracking import TrackingTask

MAX_LENGTH = 4352
TOKENS_PER_STEP = 16384
PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s")
ANSWERS = re.compile(r"(?<=Answer:)[^\n]+")


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: sequences of `length` tokens with these shares of tasks.

    Attributes:
        leave_at: running answer accuracy of every task that ends the stage.
        decay: the learning rate falls to zero over the stage.
        balanced: every sequence has the same weight in the loss, else every answer token. Programs have answers of
            thousands of tokens at the greater lengths and would drown the other tasks.
        questions: most questions in one text.
        linked: programs have the form that `program` asks for (see `ProgramTask.linked`), else plain lines.
        also: further lengths; each step draws one of all.
        fresh_optimizer: the stage begins with new optimizer moments and a short warm-up.
    """

    length: int
    mixture: dict[str, float]
    leave_at: float
    max_steps: int
    min_steps: int = 50
    learning_rate: float = 3e-3
    decay: bool = False
    balanced: bool = False
    questions: int = 16
    fresh_optimizer: bool = False
    linked: bool = False
    also: tuple[int, ...] = ()


EVERYTHING = {"copy": 0.05, "retrieval": 0.25, "multivalue": 0.15, "tracking": 0.25, "program": 0.3}
PROGRAMS = {"copy": 0.05, "retrieval": 0.15, "multivalue": 0.15, "tracking": 0.2, "program": 0.45}
STAGES = (
    Stage(64, {"copy": 1.0}, leave_at=0.95, max_steps=600),
    Stage(64, {"copy": 0.2, "retrieval": 0.8}, leave_at=0.97, max_steps=900),
    Stage(160, EVERYTHING, leave_at=0.97, max_steps=1200),
    Stage(320, EVERYTHING, leave_at=0.97, max_steps=400),
    Stage(640, EVERYTHING, leave_at=0.97, max_steps=200),
    Stage(1280, EVERYTHING, leave_at=0.97, max_steps=120, learning_rate=2e-3),
    Stage(2560, EVERYTHING, leave_at=0.97, max_steps=80, learning_rate=1.5e-3),
    Stage(1280, EVERYTHING, 0.985, 200, learning_rate=1.5e-3, balanced=True, questions=64, fresh_optimizer=True),
    Stage(2560, EVERYTHING, 0.98, 150, learning_rate=1e-3, balanced=True, questions=64),
    Stage(320, PROGRAMS, 0.985, 200, learning_rate=1.5e-3, balanced=True, linked=True),
    Stage(1280, EVERYTHING, 0.985, 150, learning_rate=1.2e-3, balanced=True, questions=64, linked=True),
    Stage(MAX_LENGTH, EVERYTHING, 2.0, 280, learning_rate=8e-4, balanced=True, questions=64, linked=True, decay=True),
    Stage(MAX_LENGTH, EVERYTHING, 2.0, 440, 50, 8e-4, True, True, 64, linked=True, also=(1280, 1280, 2560)),
)


def count_tokens(text: str) -> int:
    """Tokens of task text, counted without the tokenizer (all task words are single tokens)."""
    return len(PIECE.findall(text))


def draw(kind: str, stage: Stage, rng: random.Random) -> Problem:
    """One training problem: many questions in one text, so that a sequence carries many answer tokens."""
    length, most_questions = stage.length - 4, stage.questions
    few, many = max(2, length // 64), min(max(3, length // 12), 200)
    while True:
        filler = rng.choice((0.0, 1.0, 1.0))
        if kind == "retrieval":
            keys = rng.randint(few, many)
            asked = rng.choice((1, 2, 4, 8))
            questions = max(1, min(keys // asked, length // (20 + 6 * asked), max(24, most_questions)))
            task = RetrievalTask(kind, (keys, keys), (1, asked), questions=(1, questions), filler=filler)
        elif kind == "multivalue":
            keys = max(2, rng.randint(few, many) // 2)
            questions = max(1, min(keys, length // 50, max(24, most_questions)))
            task = RetrievalTask(kind, (keys, keys), (1, 1), values=(1, 4), questions=(1, questions), filler=filler)
        elif kind == "tracking":
            hops = rng.randint(1, 5)
            chains = max(1, min(rng.randint(1, max(1, length // 48)), 60, 300 // (hops + 1)))
            task = TrackingTask(kind, (chains, chains), (hops, hops), questions=(1, min(chains, most_questions)), filler=filler)
        else:
            task = ProgramTask(kind, linked=stage.linked)
            length = length if rng.random() < 0.7 else rng.randint(max(64, length * 3 // 10), length)
        try:
            return task.sample(length, rng, count_tokens)
        except LengthError:
            few, many = max(1, few // 2), max(2, int(many * 0.7))


def supervised(problem: Problem, chat: bool) -> tuple[str, list[tuple[int, int]]]:
    """Text of a problem with its answer, and the character spans the loss is on."""
    opening, turn = ("<|user|>", "<|assistant|>") if chat else ("", "")
    prompt = opening + problem.prompt
    spans = [match.span() for match in ANSWERS.finditer(prompt)]
    start = len(prompt) + len(turn)
    text = f"{prompt}{turn} {problem.answer}<|end|>"
    return text, [*spans, (start, len(text))]


class Batches:
    """Draws batches of token ids [N, length] and of the marks of tokens to be predicted, from (seed, step)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed

    def __call__(self, stage: Stage, step: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        rng = random.Random(f"{self.seed}/{step}")
        if stage.also:
            stage = replace(stage, length=rng.choice((stage.length, *stage.also)))
        rows = max(1, TOKENS_PER_STEP // stage.length)
        kinds = rng.choices(list(stage.mixture), weights=list(stage.mixture.values()), k=rows)
        ids = torch.full((rows, stage.length), self.tokenizer.pad_token_id)
        marks = torch.zeros((rows, stage.length), dtype=torch.bool)
        texts = [supervised(draw(kind, stage, rng), rng.random() < 0.25) if kind != "copy" else ("", []) for kind in kinds]
        encodings = self.tokenizer.backend_tokenizer.encode_batch([text for text, _ in texts])
        for row, (kind, (_, spans), encoding) in enumerate(zip(kinds, texts, encodings, strict=True)):
            if kind == "copy":
                ids[row], marks[row] = self._repeats(stage.length, rng)
                continue
            ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids[: stage.length])
            for start, end in spans:
                first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
                marks[row, first : last + 1] = True
        return ids, marks, kinds

    def _repeats(self, length: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Random segments that come again later in the sequence, the loss on the repeats: forms induction heads."""
        generator = torch.Generator().manual_seed(rng.randrange(2**62))
        period = rng.randint(min(8, length // 4), length // 2)
        segment = torch.randint(4, len(self.tokenizer), (period,), generator=generator)
        ids = segment.repeat(length // period + 1)[:length].clone()
        ids[0] = self.tokenizer.bos_token_id
        marks = torch.arange(length) > period
        return ids, marks


def causal_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """SDPA without a mask tensor (sequences are padded at the end only)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AttentionInterface.register("nano_training", causal_attention)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("nano_training")
    return model


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.set_attn_implementation("nano_training")


def train(run: Path, device: str, seed: int, polish: Path | None) -> None:
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(MAX_LENGTH)
    model = make_model(tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    state = {"stage": 0, "stage_step": 0, "step": 0, "tokens": 0, "accuracy": {}}
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    elif polish is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(polish).state_dict())
        state["stage"] = len(STAGES) - 1
    batches = Batches(tokenizer, seed)
    while state["stage"] < len(STAGES):
        stage = STAGES[state["stage"]]
        if stage.fresh_optimizer and state["stage_step"] == 0:
            optimizer.state.clear()
        torch._dynamo.reset()
        body = torch.compile(model.model, dynamic=False)
        while not finished(stage, state):
            began = time.perf_counter()
            set_learning_rate(optimizer, stage, state)
            ids, marks, kinds = batches(stage, state["step"])
            loss, scores = train_step(model, body, optimizer, ids.to(device), marks.to(device), kinds, stage.balanced)
            state["step"] += 1
            state["stage_step"] += 1
            state["tokens"] += ids.numel()
            for kind, value in scores.items():
                state["accuracy"][kind] = 0.9 * state["accuracy"].get(kind, 0.0) + 0.1 * value
            row = {k: state[k] for k in ("stage", "step", "tokens")} | {"length": ids.shape[1], "loss": round(loss, 4)}
            row |= {kind: round(value, 4) for kind, value in state["accuracy"].items()}
            row["seconds"] = round(time.perf_counter() - began, 2)
            if state["step"] % 10 == 0:
                with (run / "log.jsonl").open("a") as log:
                    print(json.dumps(row), file=log)
            if state["step"] % 50 == 0:
                save_checkpoint(checkpoint, model, optimizer, state)
        state |= {"stage": state["stage"] + 1, "stage_step": 0, "accuracy": {}}
        save_checkpoint(checkpoint, model, optimizer, state)
        save_model(model, tokenizer, run / "model")


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the checkpoint so that a stop in the middle leaves the former one."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def finished(stage: Stage, state: dict) -> bool:
    known = set(state["accuracy"]) >= set(stage.mixture)
    passed = known and min(state["accuracy"].values()) >= stage.leave_at
    return state["stage_step"] >= stage.max_steps or (passed and state["stage_step"] >= stage.min_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, stage: Stage, state: dict) -> None:
    rate = stage.learning_rate * min(1.0, (state["step"] + 1) / 100)
    if stage.fresh_optimizer:
        rate *= min(1.0, (state["stage_step"] + 1) / 30)
    if stage.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * state["stage_step"] / stage.max_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_step(model, body, optimizer, ids, marks, kinds, balanced) -> tuple[float, dict[str, float]]:
    """One update; returns the loss and, for each task, the share of answer tokens predicted right."""
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    wanted = marks[:, 1:]
    logits = model.lm_head(hidden[:, :-1][wanted])
    targets = ids[:, 1:][wanted]
    rows = torch.nonzero(wanted)[:, 0]
    losses = F.cross_entropy(logits, targets, reduction="none")
    weights = 1.0 / wanted.sum(1)[rows] if balanced else torch.ones_like(losses)
    loss = (losses * weights).sum() / weights.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    right = (logits.argmax(-1) == targets).float()
    scores = {}
    for kind in dict.fromkeys(kinds):
        mine = torch.tensor([k == kind for k in kinds], device=ids.device)[rows]
        scores[kind] = right[mine].mean().item()
    return loss.item(), scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--polish", type=Path)
    arguments = parser.parse_args()
    train(arguments.run, arguments.device, arguments.seed, arguments.polish)
