"""Where models lie: names to checkpoint directories, and a model's config and shape without its weights.

GGUF files, and models that an installed package ships as such, are converted into checkpoint directories when they are first
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specontext.checkpoints.adapters import TOKENIZER, Adapter, adapter_in
from specontext.checkpoints.config_values import check_entries
from specontext.checkpoints.files import read_json
from specontext.checkpoints.own_code import NEEDS_CODE, check_decoder_code
from specontext.checkpoints.quantization import FILES as QUANTIZATION_FILES
from specontext.checkpoints.quantization import Entry, dequantised, quantization_entry
from specontext.checkpoints.wording import in_one_sentence
from specontext.config_entries import declared
from specontext.errors import GGUFError, ModelError, SpeContextError
from specontext.gguf.cache import converted
from specontext.gguf.files import PACKAGED, is_file, only_file, packaged_file
from specontext.model_shape import ModelShape

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need it
    from transformers import PreTrainedConfig

WEIGHT_FILES = ("model*.safetensors", "*.index.json")  # in the Hub's repositories of quantised weights
KNOWN_AS = {"kimi_k2": "deepseek_v3"}  # types of models that are others by another name
CODE = ("model_type", "auto_map")  # what names a type, and code of its own
NANO = Path(__file__).parent / "models" / "nano"
OWN_HEAD = "retrieval_head"  # a model's own head lies in this directory of its checkpoint
# Retrieval heads that come with this package for models that do not, by the model's name.
HEADS = {"smollm2": Path(__file__).parent / "models" / "smollm2" / "retrieval_head"}


def resolve_model_path(name: str | Path) -> Path | str:
    """The directory of a checkpoint: the bundled one for `nano`, a directory as given, else the Hub id itself.

    A GGUF file, a directory that has nothing else, and the name of a model that a package ships ('smollm2') give the directory
    that the file was converted into; the first call converts it. The directory of a LoRA adapter gives that of its model.

    Raises:
        ModelError: a path that does not exist, a directory without a checkpoint, or a GGUF file that cannot be converted.
    """
    if str(name) == "":  # which would be the current directory
        raise ModelError(f"the name of the model is empty: give {named_models()}, a directory, a GGUF file or a Hub id")
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
            if (adapter := adapter_of(path)) is not None:
                return _base_of(adapter)
            if (file := only_file(path)) is not None:
                return converted(file)
            raise ModelError(f"{path} is not a checkpoint directory: it has no config.json{_instead_of_config(path)}")
    except GGUFError as error:
        raise ModelError(str(error)) from error
    if path.is_file():
        raise ModelError(f"{path} is a file: name the checkpoint directory with a config.json, weights and a tokenizer")
    looks_like_path = isinstance(name, Path) or path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1
    if looks_like_path or path.suffix.lower() == ".gguf":
        raise ModelError(
            f"no checkpoint directory at {path}; give {named_models()}, a directory, a GGUF file, "
            "or a Hub id like organisation/name"
        )
    return str(name)


def adapter_of(name: str | Path) -> Adapter | None:
    """The LoRA adapter that a directory is; None for any other name.

    Raises:
        ModelError: it is broken, or does not say which model it belongs to.
    """
    return adapter_in(name, ModelError)


def _base_of(adapter: Adapter) -> Path | str:
    if adapter_of(adapter.base) is not None:
        raise ModelError(f"{adapter.folder} is an adapter of an adapter, {adapter.base}: merge that one into its model first")
    try:
        return resolve_model_path(adapter.base)
    except ModelError as error:
        raise ModelError(
            f"{adapter.folder} is a LoRA adapter, and its model cannot be had: {error}; where it lies elsewhere, say so in "
            "adapter_config.json (base_model_name_or_path)"
        ) from error


def tokenizer_source(name: str | Path) -> Path | str:
    """Where a model's tokenizer lies: with its weights, or with the LoRA adapter that brings one."""
    adapter = adapter_of(name)
    return adapter.folder if adapter is not None and adapter.beside(*TOKENIZER) else resolve_model_path(name)


def named_models() -> str:
    """The models that need no path, for messages."""
    return "'nano', " + ", ".join(f"'{name}'" for name in PACKAGED)


def _instead_of_config(path: Path) -> str:
    """What a directory without a config.json is, as far as its files tell, as the rest of a sentence."""
    found = (config.parent for pattern in ("*/config.json", "snapshots/*/config.json") for config in path.glob(pattern))
    inner = sorted(folder for folder in found if folder.name != OWN_HEAD)
    if (path / "params.json").exists():
        return "; its params.json is of the maker's own format: take the checkpoint in Hugging Face's format (safetensors)"
    return f"; {inner[0]} has one: name that directory" if inner else ": download it again, whole"


def read_config(source: Path | str, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """The config of the decoder in a checkpoint directory or Hub id, as `resolve_model_path` gives them.

    Raises:
        ModelError: it is not there, broken, or of a kind that transformers does not know.
    """
    import torch
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(source, Path):
        check_entries(_config_values(source, source), source / "config.json", ModelError)
    with one_sentence(f"cannot read the config of the model {source}"):
        values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        kind, config = KNOWN_AS.get(values.get("model_type", "")), None
        if kind is None:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
        else:
            config = AutoConfig.for_model(kind, **{name: value for name, value in values.items() if name not in CODE})
            config.name_or_path = str(source)
    check_decoder_code(config, source, allowed=trust_remote_code)
    config = language_model_of(config)
    if config.dtype == torch.float64:  # nothing here is computed in more than 32 bits
        config.dtype = torch.float32
    return config


def folder_of(source: Path | str, *, revision: str | None = None, weights: bool = False) -> Path:
    """The directory with a checkpoint's files; of a Hub id the snapshot in the cache, as far as it has been downloaded.

    Args:
        weights: download a Hub id's weights too, where they are not there.

    Raises:
        ModelError: a Hub id that cannot be had.
    """
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    with one_sentence(f"no directory {source}, and it cannot be had from the Hub"):
        wanted = ["config.json", *QUANTIZATION_FILES, *(WEIGHT_FILES if weights else ())]
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))


@contextmanager
def one_sentence(failed: str) -> Iterator[None]:
    """Turns whatever a library, or code that comes with a checkpoint, raises into a ModelError of one sentence.

    Args:
        failed: what could not be done, as the sentence's beginning.
    """
    try:
        yield
    except SpeContextError:
        raise
    except Exception as error:  # a checkpoint's own code fails in any way, and so do libraries on broken files
        why = NEEDS_CODE if "trust_remote_code" in str(error) else in_one_sentence(error)
        raise ModelError(f"{failed}: {why}") from error


def quantization_of_source(source: Path | str, *, revision: str | None = None) -> Entry | None:
    """What a checkpoint says of its quantisation; None where it says nothing, or weights become plain numbers when they are read.

    Raises:
        ModelError: a broken file.
    """
    folder = folder_of(source, revision=revision)
    values = _config_values(source, folder)
    return None if dequantised(values) else quantization_entry(values, folder, ModelError)


def _config_values(source: Path | str, folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json", ModelError)
    except ModelError as error:
        raise ModelError(f"cannot read the config of the model {source}: {error}") from error


def shape_of(model: ModelShape | PreTrainedConfig | str | Path, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a decoder, without loading its weights.

    Args:
        model: a shape (returned as it is), a config, or a name that `resolve_model_path` takes.
        trust_remote_code: let code that comes with a name's checkpoint make its config.

    Raises:
        ModelError: no such model, a broken config, or one that is not a decoder's.
    """
    if isinstance(model, ModelShape):
        return model
    config: Any = model
    if isinstance(model, str | Path):
        config = read_config(resolve_model_path(model), trust_remote_code=trust_remote_code)
    config = language_model_of(config)
    if parts := parts_of(config):
        raise ModelError(f"{type(config).__name__} is not supported: it {parts}")
    try:
        return ModelShape.from_config(config)
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{type(config).__name__} does not describe a decoder with attention heads: {error}") from error


def language_model_of(config: Any) -> Any:
    """The config of the decoder of text in one of several models, such as a text model and one of images; others as they are."""
    from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

    text = getattr(config, "text_config", None)
    known = (AutoModelForImageTextToText._model_mapping, AutoModelForMultimodalLM._model_mapping)
    if not any(type(config) in kinds for kinds in known) or text is None or text.is_encoder_decoder:
        return config
    text._part_of = (
        config.architectures[0] if isinstance(config.architectures, list) and config.architectures else type(config).__name__
    )
    text.architectures, text._name_or_path = config.architectures, config._name_or_path
    text.dtype = text.dtype or config.dtype
    known_beside = declared(config)
    text._beside = {name: value for name, value in vars(config).items() if name not in known_beside and name[0] != "_"}
    outer = bool(getattr(config, "tie_word_embeddings", False))
    text.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", outer))
    text._may_be_tied = outer or text.tie_word_embeddings  # the class of all modalities asks its own config
    return text


def part_of(config: Any) -> str:
    """The architecture that a decoder's config was taken out of; '' for one that stands by itself."""
    return str(getattr(config, "_part_of", ""))


def beside(config: Any) -> dict[str, Any]:
    """Entries that stand beside a decoder's config in the one that it was taken out of, and that no class knows there."""
    found: dict[str, Any] = getattr(config, "_beside", {})
    return found


def parts_of(config: Any) -> str:
    """Says what a config of several models is made of, such as one of text and one of images; '' for a decoder of text alone."""
    if not hasattr(config, "get_text_config") or config.get_text_config(decoder=True) is config:
        return ""
    names = ", ".join(sorted(config.sub_configs))
    if not names:
        return "has a config of text in it (text_config), which its class does not look at"
    return f"is made of several models ({names}), and only decoders of text alone are loaded"
