"""What an engine starts with: a device, the model that its settings name, and the head that its methods need."""

from __future__ import annotations

import torch

from specontext.config import EngineConfig
from specontext.engine.only_windows import methods_run
from specontext.errors import ConfigError, RequestError
from specontext.models.loading import LoadedModel, load_model
from specontext.models.ranks import Ranks
from specontext.retrieval.catalog import find_head
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.random_head import random_head
from specontext.retrieval.registry import base_of, needs_head


def check_surroundings() -> None:
    """Raises RequestError where what PyTorch is set to around a call would change what is computed, or where it lies."""
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise RequestError(
            "autocast changes number formats inside the model: leave it, and load the model in that format (dtype)"
        )
    if (default := torch.get_default_device()).type != "cpu":
        raise RequestError(
            f"PyTorch's default device is {default}, where what an engine keeps on the host would lie, too: leave it "
            "(torch.set_default_device('cpu')), and name the engine's device"
        )


def pick_device(name: str) -> torch.device:
    """The device called `name`; 'auto' is a GPU if there is one.

    Raises:
        ConfigError: it does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{name}' is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device '{name}' is not there: {torch.cuda.device_count()} CUDA devices are visible")
    return device


def load_configured(config: EngineConfig, device: torch.device, ranks: Ranks | None = None) -> LoadedModel:
    """The model that an engine's settings name; of its layers a rank's part, where there are ranks.

    Raises:
        SpeContextError: as of `load_model`.
    """
    return load_model(
        config.model,
        dtype=config.dtype,
        device=device,
        load_format=config.load_format,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        ranks=ranks,
    )


def head_of(config: EngineConfig, loaded: LoadedModel) -> RetrievalHead | None:
    """The retrieval head that the methods of an engine need, on the model's device; None where they need none.

    Raises:
        HeadError: as of `find_head`.
    """
    shape, device = loaded.shape, loaded.model.device
    if not any(needs_head(name) and base_of(name) == name for name in methods_run(config, shape)):
        return None
    if config.load_format == "dummy" and config.retrieval_head == "auto":
        head = random_head(shape)
    else:
        head = find_head(
            config.retrieval_head,
            model_name=loaded.head_name,
            model_path=loaded.path,
            target=shape,
            need_map=config.method.granularity == "head",
        )
    return head.to(device=device, dtype=shape.dtype)
