"""Files that a download left behind: missing, empty, pointers of Git LFS, web pages, JSON that is none."""

from __future__ import annotations

import json
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path
from typing import Any

from specontext.errors import SpeContextError, shown

LFS_POINTER = b"version https://git-lfs.github.com/spec"
WEB_PAGES = (b"<!doctype html", b"<html")
# Files whose whole content is read again by transformers: small ones, so that parsing them here costs nothing.
OBJECTS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
CONTENT = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json")
MAY_BE_EMPTY = ("chat_template.jinja",)

Failure = type[SpeContextError]


def user_path(text: str | Path, failure: Failure) -> Path:
    """The path that somebody wrote, with the home directory for a `~` at its beginning.

    Raises:
        failure: no file can be there: the name is empty or too long, its directory may not be looked at, or nobody has that home.
    """
    if str(text) == "":  # which would be the current directory
        raise failure("the name of a file or directory is empty: name one, or '.' for the current directory")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise failure(f"cannot look at the path {shown(str(text))}: {reason}; name another one") from error
    return path


def check_file(path: Path, failure: Failure, *, may_be_empty: bool = False) -> None:
    """Raises `failure`, saying what to do, unless there is a file with content of its own."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except FileNotFoundError as error:
        gone = f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "not there"
        raise failure(f"{path} is {gone}: download it again") from error
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror or error}") from error
    if start.startswith(LFS_POINTER):
        raise failure(
            f"{path} is not the file but Git LFS's pointer to it: run `git lfs pull` in {path.parent}, or download it again"
        )
    if start.lstrip().lower().startswith(WEB_PAGES):
        raise failure(f"{path} is broken: it is a web page; download it again, logged in if its site asks for that")
    if not start and not may_be_empty:
        raise failure(f"{path} is broken or truncated: it is empty; download it again")


def read_json(path: Path, failure: Failure) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        failure: the file is not there, or holds something else.
    """
    check_file(path, failure)
    content = path.read_bytes()
    if content.startswith((BOM_UTF8, BOM_UTF16_LE, BOM_UTF16_BE)):
        raise failure(f"{path} begins with a byte order mark, which JSON may not have: save it as UTF-8 without one")
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise failure(f"{path} is broken or truncated: it is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise failure(f"{path} is broken: it is JSON, but not an object; download it again")
    return values


def check_side_files(folder: Path, failure: Failure) -> None:
    """Raises `failure` for a broken file among those that lie beside the weights: settings, tokenizer, chat template.

    transformers passes over some of them without a word, and names the file of others only in its traceback.
    """
    for name in OBJECTS:
        if _lies(folder / name):
            read_json(folder / name, failure)
    for name in CONTENT + MAY_BE_EMPTY:
        if _lies(folder / name):
            check_file(folder / name, failure, may_be_empty=name in MAY_BE_EMPTY)
    for path in (folder / name for name in MAY_BE_EMPTY if _lies(folder / name)):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise failure(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded; convert it to UTF-8") from error


def missing_shards(index: Path, failure: Failure) -> list[str]:
    """Files that an index of shards names and that are not beside it, in order.

    Raises:
        failure: the index is broken.
    """
    return [name for name in shards_of(index, failure) if not (index.parent / name).exists()]


def shards_of(index: Path, failure: Failure) -> list[str]:
    """The files that an index of shards names, in order.

    Raises:
        failure: the index is broken.
    """
    values = read_json(index, failure)
    table = values.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise failure(f"{index} is broken: its weight_map does not say which file holds which tensor; download it again")
    return sorted(set(table.values()))


def _lies(path: Path) -> bool:
    return path.exists() or path.is_symlink()
