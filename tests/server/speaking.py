"""Models that say what a test wants, so that the whole way from tokens to answers can be looked at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MARKS = ["<think>", "</think>"]


def save_speaking(
    path: Path,
    says: str,
    template: str,
    *,
    special: bool | None,
    after: str = ">",
    words: Sequence[str] = (),
    marks: Sequence[str] = (),
) -> Path:
    """A checkpoint that says a text, no token of it twice, after ">": each token alone decides the next one.

    Args:
        template: of chats; must end with `after`, a token that may come again at the end of the text: then all of it begins anew.
        words, marks: more tokens, plain and special ones.
        special: whether the marks of thinking are special tokens, other added tokens, or (None) texts of several tokens.
    """
    letters = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<eos>", *(MARKS if special else [])])
    core.add_special_tokens(list(marks))
    core.add_tokens([*(MARKS if special is False else []), *words])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = template
    size = len(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=-(-size // 16) * 16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    ids = tokenizer(after + says)["input_ids"]
    ids += [] if ids[-1] == ids[0] else [tokenizer.eos_token_id]
    assert len({*ids[1:]}) == len(ids) - 1, "a token comes twice"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        torch.nn.init.eye_(model.model.embed_tokens.weight)
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(ids):
            model.lm_head.weight[following, token] = 10
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
