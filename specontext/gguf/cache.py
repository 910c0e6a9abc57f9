"""Where converted checkpoints lie: each is made once, whole or not at all, whoever asks for it at the same time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

from specontext.errors import GGUFError
from specontext.gguf.source import VERSION

VARIABLE = "SPECONTEXT_CACHE"
FILES = "files.json"  # of a converted checkpoint: its files and their sizes
HASHED = 2**20  # bytes at a file's begin that go into its key


def cache_folder() -> Path:
    """`$SPECONTEXT_CACHE`, else `specontext` in `$XDG_CACHE_HOME`, else in `~/.cache`; without a home, among temporary files."""
    if own := os.environ.get(VARIABLE):
        return Path(os.path.expanduser(own))
    shared = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if shared.startswith("~"):  # users of containers may have no home
        return Path(tempfile.gettempdir()) / f"specontext-{os.getuid()}"
    return Path(shared) / "specontext"


def converted(path: Path) -> Path:
    """The checkpoint directory that a GGUF file was converted into; the first to ask converts, and so does who finds files of it
    missing or cut.

    A line on standard error says that it is converted, and where to.

    Raises:
        GGUFError: the file cannot be read or is not supported, or the cache cannot be written.
    """
    folder = cache_folder() / "gguf" / f"{path.stem}-{_key(path)}"
    if _is_whole(folder):
        return folder
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # the system lets go of it when its holder dies
            if _is_whole(folder):
                return folder
            again = "again, since files are missing or cut" if folder.is_dir() else "once"
            print(f"converting {path} {again}, into {folder}", file=sys.stderr, flush=True)
            for left in folder.parent.glob(f".{folder.name}.*.part"):  # of a conversion that died: nobody else is at it now
                shutil.rmtree(left, ignore_errors=True)
            _convert(path, folder)
    except (OSError, SafetensorError) as error:
        raise GGUFError(
            f"the converted checkpoint cannot be written to {folder}: {error}; "
            f"name a directory with room for it in the environment variable {VARIABLE}"
        ) from error
    return folder


def _convert(path: Path, folder: Path) -> None:
    from specontext.gguf.convert import convert

    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    try:
        draft.mkdir()
        convert(path, draft)
        sizes = {file.name: file.stat().st_size for file in draft.iterdir()}
        (draft / FILES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
        for file in draft.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if folder.is_dir():  # a damaged one
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether all files of a converted checkpoint are there, as long as they were written."""
    try:
        sizes = json.loads((folder / FILES).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _key(path: Path) -> str:
    """Another one for another file: from its size, its time, its metadata, and the version of the converter."""
    try:
        facts = path.stat()
        with path.open("rb") as stream:
            begin = stream.read(HASHED)
    except OSError as error:
        raise GGUFError(f"{path} cannot be read: {error.strerror or error}") from error
    key = hashlib.sha256(f"{VERSION} {facts.st_size} {facts.st_mtime_ns} ".encode() + begin)
    return key.hexdigest()[:16]
