"""Tokenizers from their files; one without its vocabulary is refused, where transformers makes an empty one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.checkpoints.files import check_side_files
from specontext.checkpoints.wording import first_few
from specontext.locations import ModelError, folder_of, one_sentence, resolve_model_path

WHOLE = "tokenizer.json"
VOCABULARIES = ("*.model", "vocab.*", "*.tiktoken", "tekken.json")  # what a tokenizer can be made of where that is missing


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises:
        ModelError: not found, broken, or without its vocabulary; the message names the file.
    """
    source = resolve_model_path(name)
    if isinstance(source, Path):
        check_side_files(source, ModelError)
        _check_packages(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        with one_sentence(f"cannot load the tokenizer of {source}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except ModelError as error:
        if isinstance(source, Path) and not _vocabularies(source):
            raise ModelError(f"cannot load the tokenizer of {source}: {_lacks(source, [WHOLE])}") from error
        raise
    _check_vocabulary(tokenizer, folder_of(source, revision=revision))
    return tokenizer


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
    return (
        f"its vocabulary is missing{beside}: neither {' nor '.join(wanted)} is in the directory, so download it too"
        if len(wanted) > 1
        else f"its vocabulary is missing{beside}: {wanted[0]} is not in the directory, so download it too"
    )


def _vocabularies(folder: Path) -> list[str]:
    return sorted({file.name for pattern in (WHOLE, *VOCABULARIES) for file in folder.glob(pattern)})


def _check_packages(folder: Path) -> None:
    """Raises ModelError where a tokenizer has to be made from a file that only an absent package can read."""
    if (folder / WHOLE).exists():
        return
    for file in sorted(folder.glob("*.model")):
        package, more = ("sentencepiece", " protobuf") if _is_sentencepiece(file) else ("tiktoken", "")
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"cannot load the tokenizer of {folder}: {WHOLE} is missing, and {file.name} is read by the package {package}, "
                f"which is not installed: `pip install {package}{more}`, or download {WHOLE}"
            )


def _is_sentencepiece(file: Path) -> bool:
    """Whether a vocabulary is a protocol buffer of SentencePiece; tiktoken's are lines of base64 and numbers."""
    with file.open("rb") as stream:
        return stream.read(1) == b"\n"
