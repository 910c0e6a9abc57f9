"""A long context on a card of 8 GB: 4-bit weights, most of the KV on the host, beside Hugging Face with the same weights.

Usage: python benchmarks/small_card.py [--model qwen3-8b] [--quantization int4] [--gpu-memory 8GiB] [--host-memory 32GiB]
                                       [--context 32768] [--max-model-len 65536] [--tokens 64] [--hf-tokens 8] [--json]

Random weights in the shape of a public model. PyTorch may allocate no more than the card has, whatever the GPU's size is. The
engine, warmed up as servers and `LLM` are, reads a prompt of random tokens, writes --tokens tokens, and reads another prompt;
then Hugging Face writes --hf-tokens with the same weights and its offloaded cache, whose keys and values are random numbers, so
no prompt has to be read. Prints both speeds, the peak of what was allocated, and how often PyTorch gave back what it had kept
while the second prompt was read, because the next allocation did not fit (`retries`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import date
from itertools import pairwise
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import clock, machine, versions
from transformers import DynamicCache

from specontext.cli.options import parse_size
from specontext.config import QUANTIZATIONS, EngineConfig, SpeContextConfig
from specontext.engine.generation import Generation
from specontext.engine.llm_engine import LLMEngine
from specontext.evaluation.paper.hugging_face import OFFLOADED, cudnn_allowed, kernel_choices, random_kv
from specontext.evaluation.paper.shapes import random_model, word_tokenizer
from specontext.models.attention import attention_of
from specontext.models.checking import cache_name
from specontext.models.loading import LoadedModel
from specontext.sampling_params import SamplingParams


def ours(loaded: LoadedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both prompts and of the steps of the second, tokens a second after the first, layers on the host."""
    config = EngineConfig(
        loaded.name,
        method=SpeContextConfig(budget=arguments.budget),
        load_format="dummy",
        max_num_seqs=1,
        max_model_len=arguments.max_model_len,
        gpu_memory=parse_size(arguments.gpu_memory),
        host_memory=parse_size(arguments.host_memory),
    )
    engine = LLMEngine(config, loaded)
    try:
        engine.warm_up()
        generation, first = read(engine, 1, arguments.context, arguments.tokens)
        warm = 0
        while not generation.finished and warm < 8:  # the first steps capture graphs
            engine.step()
            warm += 1
        start, count = clock(engine.device), 0
        while not generation.finished:
            engine.step()
            count += 1
        seconds = clock(engine.device) - start
        found = {"prompt_s": sum(first), "tokens_per_s": count / seconds, "offloaded_layers": len(engine.parts.kv.offloaded)}
        before = torch.cuda.memory_stats(engine.device)["num_alloc_retries"]
        _, again = read(engine, 2, arguments.context, 1)
        retries = torch.cuda.memory_stats(engine.device)["num_alloc_retries"] - before
        return found | {"prompt_again_s": sum(again), "prompt_steps_s": again, "retries": retries}
    finally:
        engine.close()


def read(engine: LLMEngine, number: int, context: int, tokens: int) -> tuple[Generation, list[float]]:
    """A request whose prompt of random tokens, another one by its number, was computed, and the seconds of the steps for it."""
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(engine.loaded.shape.vocab_size, (context,), generator=generator).tolist()
    generation = engine.add_request(str(number), prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
    times = [clock(engine.device)]
    while not generation.finished and not generation.request.decoding:
        engine.step()
        times.append(clock(engine.device))
    return generation, [b - a for a, b in pairwise(times)]


@torch.inference_mode()
def hugging_face(loaded: LoadedModel, arguments: argparse.Namespace) -> float:
    """Tokens a second with the library's offloaded cache, with or without cuDNN's attention, which plans anew for each length."""
    model, shape = loaded.model, loaded.shape
    cache = DynamicCache(config=model.config, offloading=True)
    for layer in range(shape.layers):
        cache.update(*random_kv(shape, 1, arguments.context, model.device), layer)
    ids, taken = torch.full((1, 1), 7, device=model.device), []
    for cudnn in kernel_choices(OFFLOADED, model.device):
        with attention_of(model, "sdpa"), cudnn_allowed(cudnn):
            for step in range(arguments.hf_tokens + 2):
                if step == 2:
                    began = clock(model.device)
                model(input_ids=ids, use_cache=True, **{cache_name(model): cache})
            taken.append(clock(model.device) - began)
    return arguments.hf_tokens / min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="int4")
    parser.add_argument("--gpu-memory", default="8GiB")
    parser.add_argument("--host-memory", default="32GiB")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--max-model-len", type=int, default=65536)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hf-tokens", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    limit = parse_size(arguments.gpu_memory)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    loaded = random_model(arguments.model, torch.bfloat16, device, quantization=arguments.quantization)
    loaded = replace(loaded, tokenizer=word_tokenizer(loaded.shape.vocab_size))
    report: dict[str, Any] = {"benchmark": "small_card", "date": date.today().isoformat(), "machine": machine(device)}
    report |= {"versions": versions(), **vars(arguments), "weight_bytes": loaded.weight_bytes}
    torch.cuda.reset_peak_memory_stats(device)
    report |= ours(loaded, arguments)
    report["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    report["hf_tokens_per_s"] = hugging_face(loaded, arguments)
    report["speedup_vs_hf"] = report["tokens_per_s"] / report["hf_tokens_per_s"]
    print(
        f"{arguments.model} {arguments.quantization}, {arguments.context:,} tokens: prompts {report['prompt_s']:.1f} "
        f"and {report['prompt_again_s']:.1f} s ({report['retries']} retries), "
        f"{report['tokens_per_s']:.1f} tokens/s with {report['offloaded_layers']} layers on the host, peak "
        f"{report['peak_bytes'] / 2**30:.2f} GiB of {arguments.gpu_memory}; Hugging Face "
        f"{report['hf_tokens_per_s']:.2f} tokens/s ({report['speedup_vs_hf']:.1f} x)"
    )
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
