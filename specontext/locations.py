"""Where models lie: names to checkpoint directories, and a model's shape without its weights.

GGUF files, and models that an installed package ships as such, are converted into checkpoint directories when they are first
asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specontext.core import ModelShape, SpeContextError
from specontext.gguf.cache import converted
from specontext.gguf.errors import GGUFError
from specontext.gguf.files import PACKAGED, is_file, only_file, packaged_file

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need it
    from transformers import PreTrainedConfig

NANO = Path(__file__).parent / "models" / "nano"
# Retrieval heads that come with this package for models that do not, by the model's name.
HEADS = {"smollm2": Path(__file__).parent / "models" / "smollm2" / "retrieval_head"}


class ModelError(SpeContextError):
    """A model that cannot be found, read or run; the message says why and what to do."""


def resolve_model_path(name: str | Path) -> Path | str:
    """The directory of a checkpoint: the bundled one for `nano`, a directory as given, else the Hub id itself.

    A GGUF file, a directory that has nothing else, and the name of a model that a package ships ('smollm2') give the directory
    that the file was converted into; the first call converts it.

    Raises:
        ModelError: a path that does not exist, a directory without a checkpoint, or a GGUF file that cannot be converted.
    """
    if str(name) == "nano":
        return NANO
    path = Path(name)
    try:
        if str(name) in PACKAGED:
            return converted(packaged_file(str(name)))
        if is_file(path):
            return converted(path)
        if path.is_dir():
            if (path / "config.json").is_file():
                return path
            if (file := only_file(path)) is not None:
                return converted(file)
            raise ModelError(f"{path} is not a checkpoint directory: it has no config.json")
    except GGUFError as error:
        raise ModelError(str(error)) from error
    looks_like_path = isinstance(name, Path) or path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1
    if looks_like_path or path.suffix.lower() == ".gguf":
        raise ModelError(
            f"no checkpoint directory at {path}; give {named_models()}, a directory, a GGUF file, "
            "or a Hub id like organisation/name"
        )
    return str(name)


def named_models() -> str:
    """The models that need no path, for messages."""
    return "'nano', " + ", ".join(f"'{name}'" for name in PACKAGED)


def shape_of(model: ModelShape | PreTrainedConfig | str | Path) -> ModelShape:
    """The shape of a decoder, without loading its weights.

    Args:
        model: a shape (returned as it is), a config, or a name that `resolve_model_path` takes.

    Raises:
        ModelError: no such model, a broken config, or one that is not a decoder's.
    """
    if isinstance(model, ModelShape):
        return model
    config: Any = model
    if isinstance(model, str | Path):
        from transformers import AutoConfig

        source = resolve_model_path(model)
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError) as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"cannot read the config of the model {source}: {first_line}") from error
    try:
        return ModelShape.from_config(config)
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{type(config).__name__} does not describe a decoder with ordinary attention heads: {error}") from error
