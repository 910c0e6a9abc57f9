"""Device memory and time of distilling a head for a large target, with random weights in its true shape.

Usage: python benchmarks/distill_memory.py [--length 8192] [--objectives attention,both] [--layers 32] [--device cuda]

The shape is Llama-3.1-8B's (bfloat16 weights, 32 query and 8 KV heads of 128); the head has EAGLE-3's shape, float32 weights and
Adam moments, bfloat16 products. Prints a table, then one JSON line. On a CPU it counts nothing but time: give it few layers.
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

from specontext.core import ModelShape
from specontext.distill.draft import Draft
from specontext.distill.new_head import HeadShape, new_head
from specontext.distill.settings import DistillConfig
from specontext.distill.student import Student, weighted
from specontext.distill.target import Target

GIB = 1024**3


def random_target(layers: int, length: int, device: str) -> LlamaForCausalLM:
    """Llama-3.1-8B's shape with random weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=max(length, 8192),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def measure(model: LlamaForCausalLM, objective: str, length: int, unroll: int, steps: int) -> dict[str, object]:
    """Peak memory and seconds of a step with one sequence of `length` tokens."""
    device = model.device
    shape = ModelShape.from_config(model.config)
    head = new_head(HeadShape(), shape, trained_length=length, source="benchmark", seed=0)
    config = DistillConfig(steps=steps, objective=objective, lengths=((length, 1.0),), precision="bfloat16", unroll_steps=unroll)
    draft = None
    if config.speaks:
        matrix = model.get_output_embeddings().weight
        draft = Draft(head, intermediate_size=14336, vocabulary=torch.arange(32000), lm_head=matrix)
    student = Student(head, draft).to(device)
    target = Target(model, head.config.feature_layers)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
    wanted = torch.ones(1, length, dtype=torch.bool, device=device)
    wanted[:, -1] = False
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        ids = torch.randint(shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(step)).to(device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            found = student.losses(target, (ids, wanted), config, step)
        weighted(found, config).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "objective": objective,
        "length": length,
        "trained_parameters": sum(p.numel() for p in student.parameters()),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if device.type == "cuda" else None,
        "seconds_per_step": round(min(seconds[1:]), 3),
        "loss": {name: round(value.item(), 3) for name, value in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--objectives", default="attention,both")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--unroll-steps", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    model = random_target(arguments.layers, arguments.length, arguments.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    for objective in arguments.objectives.split(","):
        rows.append(measure(model, objective, arguments.length, arguments.unroll_steps, arguments.steps))
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
    print(json.dumps(report | {"target_gib": round(weights / GIB, 2), "layers": arguments.layers, "rows": rows}))


if __name__ == "__main__":
    main()
