"""Tokenizers of GGUF files encode and decode as those of the models' authors do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from specontext.errors import GGUFError
from specontext.gguf.reading import GGUFFile
from specontext.gguf.tokenizer import tokenizer_of
from tests.gguf.gguf_files import byte_level

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = (
    "The prices rose from 12345 to 67,890 in 2024-05-06.",
    "def f(x):\n    return x + 1  # two  spaces\n\n\n",
    "Don't we'LL they've  10 20\t30",
    "naïve Zürich 東京 Ⅻ ½ \u0301e\u0301",
    "<|im_start|>user\nHello<|im_end|>\n",
    "a\u00a0b   12  345",
    "",
)


def trained(pre_tokenizer: Any) -> Tokenizer:
    """A byte-level BPE tokenizer whose merges cross everything that its way of splitting does not forbid."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text * 3 for text in TEXTS] * 4, trainer)
    return tokenizer


def of_file(metadata: dict[str, Any]) -> Tokenizer:
    said = {"general.architecture": "llama", "llama.context_length": 512}
    return tokenizer_of(GGUFFile(Path("a.gguf"), said | {f"tokenizer.{key}": value for key, value in metadata.items()}, ()))[0]


def free() -> Any:
    """Merges across digits and spaces, so that the splitting alone keeps them apart."""
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def digits_apart() -> Any:
    ways = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    return pre_tokenizers.Sequence(ways)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], bos_token=SPECIAL[1])


def smollm() -> tuple[str, Any]:
    tokenizer = free()
    tokenizer.pre_tokenizer = digits_apart()
    return "smollm", wrapped(tokenizer)


def gpt2() -> tuple[str, Any]:
    tokenizer = free()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return "gpt-2", wrapped(tokenizer)


def qwen2() -> tuple[str, Any]:
    model = json.loads(free().to_str())["model"]
    made = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    made.add_tokens([AddedToken(token, special=True) for token in SPECIAL], special_tokens=True)
    return "qwen2", made


@pytest.mark.parametrize("kind", [smollm, gpt2, qwen2], ids=lambda kind: kind.__name__)
def test_byte_level(kind: Callable[[], tuple[str, Any]]) -> None:
    pre, original = kind()
    made = of_file(byte_level(original, pre, add_bos_token=False))
    for text in TEXTS:
        ids = original(text, add_special_tokens=False).input_ids
        assert made.encode(text).ids == ids
        assert made.decode(ids, skip_special_tokens=False) == original.decode(ids)


def test_digits_stand_alone_in_smollm() -> None:
    made = of_file(byte_level(smollm()[1], "smollm", add_bos_token=False))
    assert made.encode("12345").tokens == list("12345")
    assert made.encode("  12").tokens[-2:] == ["1", "2"]


def test_llama_3_takes_three_digits_and_begins_with_its_token() -> None:
    tokenizer = free()
    made = of_file(byte_level(wrapped(tokenizer), "llama-bpe"))
    pieces = [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str("12345 I'LL go\n\n  x")]
    assert pieces == ["123", "45", "ĠI", "'LL", "Ġgo", "ĊĊ", "Ġ", "Ġx"]
    assert made.encode("go").tokens[0] == SPECIAL[1]
    assert made.encode("go", add_special_tokens=False).tokens[0] != SPECIAL[1]


def sentencepiece() -> dict[str, Any]:
    pieces = ["▁", "h", "e", "l", "o", "w", "r", "d", "1", "2", "he", "ll", "lo", "▁he", "llo", "▁hello", "wor", "or", "ld", "▁w"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "<user>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    scores = [0.0] * 259 + [-1000.0] * 10 + [-float(i) for i in range(len(pieces) - 10)] + [0.0]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    said = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores} | ids
    return {f"ggml.{key}": value for key, value in said.items()}


def test_sentencepiece() -> None:
    metadata = sentencepiece()
    made = of_file(metadata)
    assert made.encode("hello world 12").tokens[:4] == ["<s>", "▁hello", "▁", "wor"]  # "or" scores higher than "▁w"
    assert made.encode("ü").tokens == ["<s>", "▁", "<0xC3>", "<0xBC>"]
    assert made.encode("hello<user>").tokens[-1] == "<user>"
    for text in ("hello world", "  hello\n ü 12 <user>"):
        assert made.decode(made.encode(text).ids) == text
    merges = [tuple(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
    vocabulary = {token: i for i, token in enumerate(metadata["ggml.tokens"])}
    original = LlamaTokenizer(vocab=vocabulary, merges=merges)
    assert made.encode("hello world 12 lower", add_special_tokens=False).ids == original("hello world 12 lower").input_ids


def test_sentencepiece_without_a_space_first_and_with_tokens_for_runs_of_them() -> None:
    metadata = sentencepiece() | {"ggml.add_space_prefix": False, "ggml.add_bos_token": False}  # as Gemma's
    for token in ("  ", "   ", "\n\n"):  # of the user's own, written with spaces
        metadata |= {"ggml.tokens": [*metadata["ggml.tokens"], token], "ggml.token_type": [*metadata["ggml.token_type"], 4]}
        metadata["ggml.scores"] = [*metadata["ggml.scores"], 0.0]
    made = of_file(metadata)
    text = "hello  world    1\n\n  2 hello"
    pieces = ["he", "llo", "  ", "wor", "ld", "   ", "▁", "1", "\n\n", "  ", "2", "▁hello"]
    assert made.encode(text).tokens == pieces
    assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ggml.pre": None}, "does not say how it splits text"),
        ({"ggml.model": "t5"}, "of the kind 't5'"),
        ({"ggml.tokens": None}, "has no tokenizer"),
        ({"ggml.tokens": ["a", "b", "a"]}, "has the token 'a' twice"),
        ({"ggml.eos_token_id": 99999}, "its eos_token_id is 99999, and it has"),
        ({"ggml.bos_token_id": 99999}, "its bos_token_id is 99999, and it has"),
        ({"ggml.eot_token_id": -1}, "its eot_token_id is -1, and it has"),
    ],
)
def test_refusals(change: dict[str, Any], words: str, tokenizer: Any) -> None:
    with pytest.raises(GGUFError, match=words):
        of_file(byte_level(tokenizer, "gpt-2") | change)
