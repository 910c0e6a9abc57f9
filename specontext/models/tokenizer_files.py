"""Tokenizers from their files; one without its vocabulary is refused, where transformers makes an empty one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.checkpoints.files import check_side_files, read_json
from specontext.checkpoints.own_code import NEEDS_CODE, own_class
from specontext.checkpoints.wording import first_few
from specontext.errors import ModelError, shown
from specontext.locations import folder_of, one_sentence, tokenizer_source

WHOLE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.json"
PAIR = ("vocab.json", "merges.txt")  # what byte-pair tokenizers have in its place, both or neither
VOCABULARIES = (
    "*.model",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
)  # what a tokenizer can be made of where that is missing


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises:
        ModelError: not found, broken, or without its vocabulary; the message names the file.
    """
    source = tokenizer_source(name)
    if isinstance(source, Path):
        check_side_files(source, ModelError)
        _check_packages(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        with one_sentence(f"cannot load the tokenizer of {source}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except ModelError:
        _check_whole(folder_of(source, revision=revision))  # what the library says of such files does not name them
        raise
    _check_vocabulary(tokenizer, folder_of(source, revision=revision))
    if not trust_remote_code:
        _check_code(tokenizer, folder_of(source, revision=revision))
    with one_sentence(f"the tokenizer of {source} cannot encode a text"):  # some settings are not looked at before
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ModelError(f"the tokenizer of {source} has no tokens for a text such as 'a': download its files again, whole")
    tokenizer.clean_up_tokenization_spaces = False  # else the text of an output differs from that of its tokens one by one
    _take_template(tokenizer, folder_of(source, revision=revision))
    return tokenizer


def _check_code(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises ModelError where a tokenizer of the checkpoint's own was left aside for one that need not split texts as it does."""
    if not (folder / SETTINGS).is_file():
        return
    settings = read_json(folder / SETTINGS, ModelError)
    if own := own_class(
        settings.get("auto_map"), "AutoTokenizer", [type(tokenizer).__name__, str(settings.get("tokenizer_class"))]
    ):
        raise ModelError(
            f"cannot load the tokenizer of {folder}: {own} (auto_map in {SETTINGS}) may split texts otherwise than transformers' "
            f"{type(tokenizer).__name__}, and {NEEDS_CODE}; to take transformers', remove auto_map"
        )


def _take_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The template of `chat_template.json`, where makers of models that read images put it, and which only processors read."""
    if tokenizer.chat_template is None and (folder / TEMPLATE).is_file():
        tokenizer.chat_template = read_json(folder / TEMPLATE, ModelError).get("chat_template")
    template: Any = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [] if template is None else [template]
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise ModelError(f"the chat template of {folder} should be a text, got {shown(odd[0])}: download it again, or mend it")


def _check_whole(folder: Path) -> None:
    """Raises ModelError for a vocabulary that is missing, in part or whole, or broken."""
    if (folder / WHOLE).exists():
        if "model" not in read_json(folder / WHOLE, ModelError):
            raise ModelError(f"{folder / WHOLE} is broken: it holds no tokenizer; download it again")
    elif not _vocabularies(folder):
        raise ModelError(f"cannot load the tokenizer of {folder}: {_lacks(folder, [WHOLE])}")
    elif (lacking := [name for name in PAIR if not (folder / name).exists()]) and len(lacking) < len(PAIR):
        raise ModelError(f"cannot load the tokenizer of {folder}: {_lacks(folder, lacking)}")


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises ModelError for a tokenizer whose files are not there: it was made without them, and knows next to nothing."""
    files = tokenizer.vocab_files_names
    needed = [files[kind] for kind in ("vocab_file", "merges_file") if kind in files]
    if not files or (folder / WHOLE).is_file():
        return
    lacking = [name for name in needed if not (folder / name).is_file()]
    if lacking == needed and _vocabularies(folder) and tokenizer.vocab_size > 256:  # from a file of another name
        return
    if lacking or not needed:
        raise ModelError(f"cannot load the tokenizer of {folder}: {_lacks(folder, lacking)}")


def _lacks(folder: Path, names: list[str]) -> str:
    wanted = names if WHOLE in names else [WHOLE, *names]
    there = _vocabularies(folder)
    beside = f" ({first_few(there)} alone is not enough)" if there else ""
    missing = f"neither {' nor '.join(wanted)}" if len(wanted) > 1 else f"no {wanted[0]}"
    return f"its vocabulary is missing{beside}: {missing} is in the directory, so download it too"


def _vocabularies(folder: Path) -> list[str]:
    return sorted({file.name for pattern in (WHOLE, *VOCABULARIES) for file in folder.glob(pattern)})


def _check_packages(folder: Path) -> None:
    """Raises ModelError where a tokenizer has to be made from a file that only an absent package can read."""
    if any(not name.endswith(".model") for name in _vocabularies(folder)):
        return
    for file in sorted(folder.glob("*.model")):
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        if not _is_sentencepiece(file):
            needed = {"tiktoken": "tiktoken"}
        if absent := [package for package, module in needed.items() if not _is_installed(module)]:
            raise ModelError(
                f"cannot load the tokenizer of {folder}: {WHOLE} is missing, and {file.name} cannot be read without "
                f"{' and '.join(absent)}: `pip install {' '.join(absent)}`, or download {WHOLE}"
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is part of is not there
        return False


def _is_sentencepiece(file: Path) -> bool:
    """Whether a vocabulary is a protocol buffer of SentencePiece; tiktoken's are lines of base64 and numbers."""
    with file.open("rb") as stream:
        return stream.read(1) == b"\n"
