"""Where models lie: names to checkpoint directories, and a model's shape without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specontext.core import ModelShape, SpeContextError

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need it
    from transformers import PreTrainedConfig

NANO = Path(__file__).parent / "models" / "nano"


class ModelError(SpeContextError):
    """A model that cannot be found, read or run; the message says why and what to do."""


def resolve_model_path(name: str | Path) -> Path | str:
    """The directory of a checkpoint: the bundled one for `nano`, a directory as given, else the Hub id itself.

    Raises:
        ModelError: a path that does not exist, or a directory without a config.json.
    """
    if str(name) == "nano":
        return NANO
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a checkpoint directory: it has no config.json")
        return path
    looks_like_path = isinstance(name, Path) or path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1
    if looks_like_path:
        raise ModelError(f"no checkpoint directory at {path}; give 'nano', a directory, or a Hub id like organisation/name")
    return str(name)


def shape_of(model: ModelShape | PreTrainedConfig | str | Path) -> ModelShape:
    """The shape of a decoder, without loading its weights.

    Args:
        model: a shape (returned as it is), a config, or a name: 'nano', a checkpoint directory or a Hub id.

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
    if parts := parts_of(config):
        raise ModelError(f"{type(config).__name__} is not supported: it {parts}")
    try:
        return ModelShape.from_config(config)
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{type(config).__name__} does not describe a decoder with attention heads: {error}") from error


def parts_of(config: Any) -> str:
    """Says what a config of several models is made of, such as one of text and one of images; '' for a decoder of text alone."""
    if not hasattr(config, "get_text_config") or config.get_text_config(decoder=True) is config:
        return ""
    names = ", ".join(sorted(config.sub_configs))
    return f"is made of several models ({names}), and only decoders of text alone are loaded"
