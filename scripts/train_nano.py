"""Train the bundled model `nano` on generated tasks.

Usage: python scripts/train_nano.py RUN_DIR [--device cuda --workers 5]
       python scripts/train_nano.py POLISHED_DIR --polish RUN_DIR/model --seed 1 [--device cuda --workers 7]

The curriculum is a list of stages; a stage is left when the running answer accuracy of each of its tasks passes its mark,
never by the clock (a step limit only stops a stage that fails to learn). Every batch is drawn from (seed, step), so a run
that is stopped continues from `RUN_DIR/checkpoint.pt` as if it had not been. `RUN_DIR/log.jsonl` keeps the losses and
accuracies, `RUN_DIR/model` the Hugging Face checkpoint. `--polish` runs the `POLISH` stage alone, in which the learning rate
falls to zero, from the weights in a directory and with new optimizer moments; its seed is its own, for new problems.
On a GPU the matrix products are in bfloat16 and worker processes draw the batches ahead.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nano_tokenizer import build as build_tokenizer
from specontext.tasks.training import sequence
from specontext.tasks.words import count_words

MAX_LENGTH = 16640
SPECIAL_TOKENS = 4
END_WEIGHT = 0.02


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: sequences of `length` tokens with these shares of tasks.

    Attributes:
        leave_at: running answer accuracy of every task that ends the stage.
        decay: the learning rate falls to zero over the stage.
        also: further lengths; each step draws one of all.
    """

    length: int
    mixture: dict[str, float]
    leave_at: float
    max_steps: int
    learning_rate: float = 3e-3
    decay: bool = False
    also: tuple[int, ...] = ()
    min_steps: int = 50


EVERYTHING = {"copy": 0.03, "retrieval": 0.25, "multivalue": 0.2, "tracking": 0.25, "program": 0.27}
LONG = {"retrieval": 0.2, "multivalue": 0.25, "tracking": 0.25, "program": 0.3}
STAGES = (
    Stage(64, {"copy": 1.0}, 0.95, 600),
    Stage(64, {"copy": 0.2, "retrieval": 0.8}, 0.97, 900),
    Stage(160, EVERYTHING, 0.97, 1500),
    Stage(320, EVERYTHING, 0.97, 500),
    Stage(640, EVERYTHING, 0.97, 400),
    Stage(1280, EVERYTHING, 0.97, 300, learning_rate=2.5e-3, also=(320,)),
    Stage(2560, EVERYTHING, 0.97, 300, learning_rate=2e-3, also=(640,)),
    Stage(5120, LONG, 0.97, 300, learning_rate=1.5e-3, also=(1280,)),
    Stage(10240, LONG, 0.97, 300, learning_rate=1.5e-3, also=(640, 2560)),
    Stage(MAX_LENGTH, LONG, 2.0, 3000, learning_rate=1.5e-3, also=(640, 1280, 2560, 4352, 4352, 8448)),
)
POLISH = Stage(
    MAX_LENGTH,
    {"retrieval": 0.2, "multivalue": 0.3, "tracking": 0.2, "program": 0.3},
    leave_at=2.0,
    max_steps=3600,
    learning_rate=1.5e-3,
    decay=True,
    also=(640, 1280, 2560, 4352, 4352, 8448, 8448, MAX_LENGTH),
)


class Batches(torch.utils.data.Dataset):
    """Draws batches of token ids [N, length] and of the marks of tokens to be predicted, from (seed, step)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int, tokens_per_step: int) -> None:
        self.tokenizer, self.stage, self.seed, self.tokens_per_step = tokenizer, stage, seed, tokens_per_step

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        stage = self.stage
        rng = random.Random(f"{self.seed}/{step}")
        length = rng.choice((stage.length, *stage.also))
        rows = max(1, self.tokens_per_step // length)
        kinds = rng.choices(list(stage.mixture), weights=list(stage.mixture.values()), k=rows)
        ids = torch.full((rows, length), self.tokenizer.pad_token_id)
        marks = torch.zeros((rows, length), dtype=torch.bool)
        texts = [("", []) if kind == "copy" else sequence(kind, length - SPECIAL_TOKENS, rng, count_words) for kind in kinds]
        encodings = self.tokenizer.backend_tokenizer.encode_batch([text for text, _ in texts])
        for row, (kind, (_, spans), encoding) in enumerate(zip(kinds, texts, encodings, strict=True)):
            if kind == "copy":
                ids[row], marks[row] = self._repeats(length, rng)
                continue
            ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
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
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=MAX_LENGTH,
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


def train(arguments: argparse.Namespace) -> None:
    run, device = arguments.run, arguments.device
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(MAX_LENGTH)
    model = make_model(tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    state = {"stage": 0, "stage_step": 0, "step": 0, "tokens": 0, "accuracy": {}}
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    elif arguments.polish is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(arguments.polish).state_dict())
    stages = STAGES if arguments.polish is None else (POLISH,)
    while state["stage"] < len(stages):
        run_stage(stages[state["stage"]], state, model, optimizer, tokenizer, arguments)
        state |= {"stage": state["stage"] + 1, "stage_step": 0, "accuracy": {}}
        save_checkpoint(checkpoint, model, optimizer, state)
        save_model(model, tokenizer, run / "model")


def run_stage(
    stage: Stage,
    state: dict,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerFast,
    arguments: argparse.Namespace,
) -> None:
    """Train until the stage is passed; batches are drawn ahead by worker processes where there are any."""
    run, device = arguments.run, arguments.device
    body = model.model
    if device == "cpu":
        torch._dynamo.reset()
        body = torch.compile(body, dynamic=False)
    batches = Batches(tokenizer, stage, arguments.seed, arguments.tokens_per_step)
    steps = range(state["step"], state["step"] + stage.max_steps - state["stage_step"])
    ahead = {"num_workers": arguments.workers, "prefetch_factor": 8} if arguments.workers else {}
    began = time.perf_counter()
    for ids, marks, kinds in torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, **ahead):
        set_learning_rate(optimizer, stage, state)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, scores = train_step(model, body, optimizer, ids.to(device), marks.to(device), kinds)
        state["step"] += 1
        state["stage_step"] += 1
        state["tokens"] += ids.numel()
        for kind, value in scores.items():
            state["accuracy"][kind] = 0.9 * state["accuracy"].get(kind, 0.0) + 0.1 * value
        row = {k: state[k] for k in ("stage", "step", "tokens")} | {"length": ids.shape[1], "loss": round(loss, 4)}
        row |= {kind: round(value, 4) for kind, value in state["accuracy"].items()}
        row["seconds"] = round(time.perf_counter() - began, 2)
        began = time.perf_counter()
        if state["step"] % 10 == 0:
            with (run / "log.jsonl").open("a") as log:
                print(json.dumps(row), file=log)
        if state["step"] % 200 == 0:
            save_checkpoint(run / "checkpoint.pt", model, optimizer, state)
        if state["step"] % 1000 == 0:
            save_model(model, tokenizer, run / "model")
        known = set(state["accuracy"]) >= set(stage.mixture)
        if known and min(state["accuracy"].values()) >= stage.leave_at and state["stage_step"] >= stage.min_steps:
            break


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the checkpoint so that a stop in the middle leaves the former one."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def set_learning_rate(optimizer: torch.optim.Optimizer, stage: Stage, state: dict) -> None:
    rate = stage.learning_rate * min(1.0, (state["step"] + 1) / 100)
    if stage.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * state["stage_step"] / stage.max_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_step(model, body, optimizer, ids, marks, kinds) -> tuple[float, dict[str, float]]:
    """One update; returns the loss and, for each task, the share of answer tokens predicted right.

    Every sequence has the same weight in the loss: programs have answers of thousands of tokens at the greater lengths
    and would drown the other tasks. The end token weighs more than its share, since a long answer has only one.
    """
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    wanted = marks[:, 1:]
    logits = model.lm_head(hidden[:, :-1][wanted]).float()
    targets = ids[:, 1:][wanted]
    rows = torch.nonzero(wanted)[:, 0]
    losses = F.cross_entropy(logits, targets, reduction="none")
    weights = 1.0 / wanted.sum(1)[rows] + END_WEIGHT * (targets == model.config.eos_token_id)
    loss = (losses * weights).sum() / weights.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    right = (logits.argmax(-1) == targets).float()
    row_of = {kind: torch.tensor([k == kind for k in kinds], device=ids.device)[rows] for kind in dict.fromkeys(kinds)}
    shares = torch.stack([loss.detach(), *(right[mine].mean() for mine in row_of.values())]).tolist()
    return shares[0], dict(zip(row_of, shares[1:], strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--tokens-per-step", type=int, default=65536)
    parser.add_argument("--polish", type=Path)
    train(parser.parse_args())
