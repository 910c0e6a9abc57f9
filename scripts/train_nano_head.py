"""Distil the retrieval head of the bundled model `nano` from its attention on generated tasks.

Usage: python scripts/train_nano_head.py MODEL_DIR OUT_DIR [--steps 220] [--seed 0]

Sequences are those that train the model, drawn from other seeds, at lengths from 512 tokens to the longest. A run that is
stopped continues from `OUT_DIR/checkpoint.pt`. `OUT_DIR/log.jsonl` keeps loss and held-out recall, `OUT_DIR/recall.json`
the final table, `OUT_DIR/config.json` and `OUT_DIR/model.safetensors` are the head.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from train_nano import POLISH, Batches
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specontext.distill.attention import Batch, DistillConfig, Target, measure, train
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.head import HeadConfig, RetrievalHead

TRAINED_LENGTH = 4352
TOKENS_PER_STEP = 16384
LENGTHS = {512: 0.1, 1024: 0.15, 2048: 0.25, TRAINED_LENGTH: 0.5}
HELD_OUT_LENGTHS = (1024, 4096)
SEED_OFFSET, HELD_OUT_SEED = 1_000_000, 2_000_000  # away from each other and from the seeds that trained the model


def make_head(model: LlamaForCausalLM, heads: int, head_dim: int, seed: int) -> RetrievalHead:
    config = model.config
    torch.manual_seed(seed)
    return RetrievalHead(
        HeadConfig(
            variant="features",
            hidden_size=config.hidden_size,
            target_hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_dim=head_dim,
            feature_layers=(1, 2, 3),
            trained_length=TRAINED_LENGTH,
            recommended_budget=256,
            source="attention distillation on generated tasks, scripts/train_nano_head.py",
        )
    )


def draw(tokenizer: PreTrainedTokenizerFast, seed: int, mixture: dict[str, float], length: int, step: int) -> Batch:
    """Token ids [N, length] and the mask [N, length] of positions whose next token is an answer."""
    stage = replace(POLISH, length=length, mixture=mixture, also=())
    ids, marks, _ = Batches(tokenizer, stage, seed, TOKENS_PER_STEP)[step]
    return ids, torch.cat((marks[:, 1:], torch.zeros_like(marks[:, :1])), 1)


def table(head: RetrievalHead, target: Target, tokenizer: PreTrainedTokenizerFast, config: DistillConfig, rounds: int) -> list[dict]:
    """Held-out recall: one row for each task kind, length and budget of 1/8 and 1/16 of the length."""
    rows = []
    for length in HELD_OUT_LENGTHS:
        for kind in POLISH.mixture:
            drawn = (draw(tokenizer, HELD_OUT_SEED, {kind: 1.0}, length, step) for step in range(rounds))
            recalls = measure(head, target, drawn, config, (length // 8, length // 16))
            rows += [{"kind": kind, "length": length, "budget": budget} | recall for budget, recall in recalls.items()]
    return rows


def summary(rows: list[dict]) -> dict[str, float]:
    """The head's recall by length and budget, averaged over task kinds."""
    recalls: dict[str, list[float]] = {}
    for row in rows:
        recalls.setdefault(f"recall_{row['length']}_{row['budget']}", []).append(row["head"])
    return {name: round(sum(values) / len(values), 4) for name, values in recalls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--student-pool", choices=("max", "mean"), default="max")
    parser.add_argument("--teacher-pool", choices=("max", "mean"), default="max")
    parser.add_argument("--measure-every", type=int, default=100)
    arguments = parser.parse_args()

    model = LlamaForCausalLM.from_pretrained(arguments.model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    head = make_head(model, arguments.heads, arguments.head_dim, arguments.seed)
    target = Target(model, head.config.feature_layers)
    config = DistillConfig(
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        student_pool=arguments.student_pool,
        teacher_pool=arguments.teacher_pool,
        measure_every=arguments.measure_every,
        seed=arguments.seed,
    )
    def drawn(step: int) -> Batch:
        rng = random.Random(f"length/{arguments.seed}/{step}")
        length = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
        return draw(tokenizer, arguments.seed + SEED_OFFSET, POLISH.mixture, length, step)

    train(
        head,
        target,
        drawn,
        config,
        arguments.out,
        evaluate=lambda: summary(table(head, target, tokenizer, config, rounds=1)),
    )
    save_head(head, arguments.out)
    rows = table(head, target, tokenizer, config, rounds=2)
    (arguments.out / "recall.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("kind         length budget   head shared  layer window")
    for row in rows:
        recalls = " ".join(f"{row[name]:6.3f}" for name in ("head", "shared", "layer", "window"))
        print(f"{row['kind']:12} {row['length']:6} {row['budget']:6} {recalls}")


if __name__ == "__main__":
    main()
