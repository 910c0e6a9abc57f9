"""A Hugging Face model whose own generate() reads only the KV that a retrieval head chooses.

python examples/hf_generate.py            # nano, which comes with this package
python examples/hf_generate.py smollm2    # a real model, where its package is installed (docs/smollm2.md)
python examples/hf_generate.py CHECKPOINT --retrieval-head HEAD --budget 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pydoc_data.topics import topics  # a text that lies on every machine
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import specontext
from specontext.locations import resolve_model_path
from specontext.tasks import sample_problems

NOTE = "A note from the kitchen: the cook of the research station is called Margaret Ellison.\n\n"


def question(model: str, tokenizer: Any, length: int) -> Any:
    """A text with one fact that is asked for, in a chat; nano has learned its own way of asking."""
    if model == "nano":

        def count(text: str) -> int:
            return len(tokenizer(text)["input_ids"])

        [problem] = sample_problems("niah_multikey", length=length, seed=0, n=1, count_tokens=count)
        return tokenizer(problem.prompt, return_tensors="pt")
    ids = tokenizer("\n\n".join(str(topics[name]) for name in ("debugger", "lambda", "assert", "raise")))["input_ids"][:length]
    paragraphs = str(tokenizer.decode(ids)).split("\n\n")
    paragraphs.insert(len(paragraphs) // 2, NOTE)
    text = "\n\n".join([*paragraphs, "Question: who is the cook of the research station?"])
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano", help="nano, smollm2, a checkpoint directory or a Hub id")
    parser.add_argument("--retrieval-head", default="auto")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    asked = parser.parse_args(arguments)

    # Everything up to `enable` is ordinary transformers.
    source = resolve_model_path(asked.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, device_map="cuda" if torch.cuda.is_available() else None)
    inputs = question(asked.model, tokenizer, asked.length).to(model.device)
    options = {"max_new_tokens": asked.max_new_tokens, "do_sample": False}

    config = specontext.SpeContextConfig(budget=asked.budget)
    enabled = specontext.enable(model, retrieval_head=asked.retrieval_head, config=config)
    model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))
    [stats] = enabled.statistics
    assert stats is not None
    read, length = stats["tokens_read_per_step"], inputs["input_ids"].shape[1]
    print(f"each token read {read:.0f} of some {length} KV entries a head; overlap {stats['overlap']:.0%}")

    specontext.disable(model)  # and now it reads everything
    model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))


if __name__ == "__main__":
    main()
