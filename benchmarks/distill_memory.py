"""Device memory and time of distilling a head for a target, with random weights in its true shape.

Usage: python benchmarks/distill_memory.py [--target llama-3.1-8b] [--trainings attention,standard,loop,both] [--length 8192]
           [--sequences 1] [--queries 256] [--layers N] [--device cuda]

A training is `attention` (what the target attends to, a head of EAGLE-3's form), `standard` (effects beside it, the standard
form), `loop` (the same with the selection in the loop) or `both` (attention and a whole draft). The target is in bfloat16, the
head and its Adam moments in float32, products in bfloat16. Prints a table, then one JSON line. On a CPU it counts nothing
but time: give it few layers.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from specontext.distill.draft import Draft
from specontext.distill.new_head import HeadShape, new_head, standard_shape
from specontext.distill.settings import DistillConfig
from specontext.distill.student import Student, weighted
from specontext.distill.target import Target
from specontext.model_shape import ModelShape

GIB = 1024**3


# Vocabulary, hidden and intermediate size, layers, query and KV heads, width of a head.
SHAPES = {
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8, 128),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64),
}
TRAININGS = ("attention", "standard", "loop", "both")


def random_target(name: str, layers: int | None, length: int, device: str) -> LlamaForCausalLM:
    """A shape of `SHAPES` with random weights."""
    vocabulary, hidden, intermediate, depth, heads, kv_heads, width = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        max_position_embeddings=max(length, 8192),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def measure(model: LlamaForCausalLM, training: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Peak memory and seconds of a step."""
    device, length = model.device, arguments.length
    shape = ModelShape.from_config(model.config)
    form = standard_shape(shape) if training in ("standard", "loop") else HeadShape()
    head = new_head(form, shape, trained_length=length, source="benchmark", seed=0)
    config = DistillConfig(
        steps=arguments.steps,
        objective="both" if training == "both" else "attention",
        lengths=((length, 1.0),),
        precision="bfloat16",
        queries=arguments.queries,
        effect_weight=1.0 if training in ("standard", "loop") else 0.0,
        unroll_steps=arguments.unroll_steps,
    )
    draft = None
    if config.speaks:
        matrix = model.get_output_embeddings().weight
        draft = Draft(head, intermediate_size=model.config.intermediate_size, vocabulary=torch.arange(32000), lm_head=matrix)
    student = Student(head, draft).to(device)
    target = Target(model, head.config.feature_layers)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
    wanted = torch.ones(arguments.sequences, length, dtype=torch.bool, device=device)
    wanted[:, -1] = False
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(arguments.steps):
        ids = torch.randint(shape.vocab_size, wanted.shape, generator=torch.Generator().manual_seed(step)).to(device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            found = student.losses(target, (ids, wanted), config, step, loop=training == "loop")
        weighted(found, config).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "training": training,
        "tokens": wanted.numel(),
        "trained_parameters": sum(p.numel() for p in student.parameters()),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if device.type == "cuda" else None,
        "seconds_per_step": round(min(seconds[1:]), 3),
        "loss": {name: round(value.item(), 3) for name, value in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--trainings", default=",".join(TRAININGS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--unroll-steps", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    model = random_target(arguments.target, arguments.layers, arguments.length, arguments.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    for training in arguments.trainings.split(","):
        rows.append(measure(model, training, arguments))
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    table = Table(title=f"distilling for a target of {weights / GIB:.1f} GiB")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    machine = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"benchmark": "distill_memory", "date": date.today().isoformat(), "machine": machine, **versions}
    print(json.dumps(report | vars(arguments) | {"target_gib": round(weights / GIB, 2), "rows": rows}))


if __name__ == "__main__":
    main()
