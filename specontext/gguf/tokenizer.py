"""The tokenizer that a GGUF file describes, as the `tokenizer.json` that the model's authors would ship.

A file names its way of splitting text (`tokenizer.ggml.pre`) and nothing more: the rules stand in llama.cpp, and here. A way that
is not known is refused, since other tokens than those of the training would be fed to the model unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from specontext.errors import GGUFError
from specontext.gguf.reading import GGUFFile


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens, as far as they matter here."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _pattern(regex: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_])


SPLITTING: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "qwen2": _pattern(_QWEN2),
    "deepseek-r1-qwen": _pattern(_QWEN2),
    "llama-bpe": _pattern(_LLAMA3),
    "llama3": _pattern(_LLAMA3),
    "llama-v3": _pattern(_LLAMA3),
}
LLAMA3_KIND = {"llama-bpe", "llama3", "llama-v3"}  # whole words of the vocabulary are taken unmerged; BOS comes first
NORMALISED = {"qwen2"}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(file: GGUFFile) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and the values of its `tokenizer_config.json`.

    Raises:
        GGUFError: the file has none, or one of a kind that is not supported.
    """
    tokens = _said(file, "tokens")
    if not tokens:
        raise GGUFError(f"{file.path} has no tokenizer: its metadata lack tokenizer.ggml.tokens")
    _check_tokens(file, tokens)
    kind = _said(file, "model")
    types = _said(file, "token_type") or [1] * len(tokens)
    if kind == "gpt2":
        tokenizer, begins = _byte_level(file, tokens), _said(file, "pre") in LLAMA3_KIND
    elif kind == "llama":
        tokenizer, begins = _sentencepiece(file, tokens, types), True
    else:
        raise GGUFError(f"{file.path} has a tokenizer of the kind '{kind}': gpt2 and llama can be read")
    for special in (True, False):
        wanted = TokenType.CONTROL if special else TokenType.USER_DEFINED
        added = [
            AddedToken(token, special=special, normalized=False) for token, t in zip(tokens, types, strict=True) if t == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    config = _config(file, tokens)
    before = ["bos_token"] * bool(_flag(file, "add_bos_token", begins))
    after = ["eos_token"] * bool(_flag(file, "add_eos_token", False))
    if before or after:
        tokenizer.post_processor = _framed(
            file, [config.get(name) for name in before], [config.get(name) for name in after], tokens
        )
    return tokenizer, config


def _check_tokens(file: GGUFFile, tokens: Sequence[str]) -> None:
    """Raises GGUFError for tokens that none, or more than one, would be found for."""
    if len(set(tokens)) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise GGUFError(f"the tokenizer of {file.path} is broken: it has the token {twice!r} twice")
    for name in ("bos", "eos", "eot", "unknown", "padding"):
        id_ = _said(file, f"{name}_token_id")
        if id_ is not None and not 0 <= int(id_) < len(tokens):
            raise GGUFError(
                f"the tokenizer of {file.path} is broken: its {name}_token_id is {id_}, and it has {len(tokens)} tokens; "
                "take another conversion of the model"
            )


def _config(file: GGUFFile, tokens: Sequence[str]) -> dict[str, Any]:
    ids = {name: _said(file, f"{said}_token_id") for name, said in SPECIAL.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(file.need("context_length")),
        **{name: tokens[int(id_)] for name, id_ in ids.items() if id_ is not None},
    }
    if template := file.metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _byte_level(file: GGUFFile, tokens: Sequence[str]) -> Tokenizer:
    way = _said(file, "pre")
    if way not in SPLITTING:
        named = f"splits text the way '{way}'" if way else "does not say how it splits text (tokenizer.ggml.pre)"
        raise GGUFError(f"the tokenizer of {file.path} {named}; known are {', '.join(SPLITTING)}")
    merges = [tuple(merge.split(" ", 1)) for merge in _said(file, "merges") or ()]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=way in LLAMA3_KIND))
    tokenizer.normalizer = normalizers.NFC() if way in NORMALISED else None
    tokenizer.pre_tokenizer = SPLITTING[way]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    scores = _said(file, "scores")
    if not scores:
        raise GGUFError(f"the tokenizer of {file.path} is incomplete: it lacks tokenizer.ggml.scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    unmerged = {TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE}
    words = {token: scores[i] for token, i in vocabulary.items() if types[i] not in unmerged}
    bpe = models.BPE(vocab=vocabulary, merges=_merges(words, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    space_first = _flag(file, "add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] * space_first + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * space_first
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(words: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merges that do what SentencePiece does with scores: the better word first, and every way to make it."""
    found = []
    for word, score in words.items():
        ways = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in words and word[i:] in words]
        found += [(score, way) for way in sorted(ways, key=lambda way: (vocabulary[way[0]], vocabulary[way[1]]))]
    found.sort(key=lambda merge: merge[0], reverse=True)
    return [way for _, way in found]


def _framed(
    file: GGUFFile, before: Sequence[str | None], after: Sequence[str | None], tokens: Sequence[str]
) -> processors.PostProcessor:
    named = [token for token in (*before, *after) if token is not None]
    if len(named) != len(before) + len(after):
        raise GGUFError(f"the tokenizer of {file.path} wants begin or end tokens and does not name them")
    start, end = ([f"{token}:0" for token in some] for some in (before, after))
    single = [*start, "$A:0", *end]
    pair = [*single, *(part.replace(":0", ":1") for part in start), "$B:1", *(part.replace(":0", ":1") for part in end)]
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(t, tokens.index(t)) for t in dict.fromkeys(named)]
    )


def _said(file: GGUFFile, key: str) -> Any:
    return file.metadata.get(f"tokenizer.ggml.{key}")


def _flag(file: GGUFFile, key: str, default: bool) -> bool:
    value = _said(file, key)
    return default if value is None else bool(value)
