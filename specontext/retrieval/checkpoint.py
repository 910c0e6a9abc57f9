"""Retrieval heads on disk: a directory of `config.json` and `model.safetensors` with EAGLE-3's tensor names.

A whole EAGLE-3 draft, from a directory or the Hub, is pruned while it is read.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from specontext.checkpoints.files import user_path
from specontext.checkpoints.weights import what_is_there
from specontext.checkpoints.wording import first_few, in_one_sentence
from specontext.errors import HeadError
from specontext.locations import HEADS, NANO, OWN_HEAD, shape_of
from specontext.model_shape import ModelShape
from specontext.retrieval.draft import EMBEDDING, config_values, read_draft, read_weights
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need it
    from transformers import PreTrainedConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# EAGLE-3's tensor names, by the head's own; norms that a variant lacks are absent.
NAMES = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "midlayer.hidden_norm.weight",
    "input_layernorm.weight": "midlayer.input_layernorm.weight",
    "q_proj.weight": "midlayer.self_attn.q_proj.weight",
    "q_a_proj.weight": "midlayer.self_attn.q_a_proj.weight",
    "q_b_proj.weight": "midlayer.self_attn.q_b_proj.weight",
    "k_proj.weight": "midlayer.self_attn.k_proj.weight",
    "q_norm.weight": "midlayer.self_attn.q_norm.weight",
    "k_norm.weight": "midlayer.self_attn.k_norm.weight",
    "feature_norm.weight": "input_norm.weight",
    "embed_tokens": EMBEDDING,
}


def tensor_name(name: str) -> str:
    """EAGLE-3's name of a parameter of the head."""
    return name.replace("feature_norms.", "fc_norm.") if name.startswith("feature_norms.") else NAMES[name]


def save_head(head: RetrievalHead, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `head` to `folder`, beside other files that lie there; a folder with a config.json is always whole.

    Both files are written to a temporary directory and moved when they are complete. An older head is taken away first, so
    that its weights never lie beside the new config.

    Args:
        dtype: number format of the matrices; None keeps the head's own. Weights of norms stay as they are.

    Raises:
        HeadError: values that are not finite numbers, a folder that holds something else than a head, or one that cannot be
            written; what was there before is left as it was.
    """
    check_place(folder)
    folder = Path(folder).absolute()
    tensors = {
        tensor_name(name): tensor.detach().to(dtype if tensor.dim() > 1 else None).contiguous().cpu()
        for name, tensor in head.state_dict().items()
    }
    if odd := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise HeadError(f"the head was not written to {folder}: {', '.join(odd)} holds values that are not finite numbers")
    made = uuid.uuid4().hex
    draft = folder / f".{made}" if folder.exists() else folder.with_name(f".{folder.name}.{made}")
    try:
        draft.mkdir(parents=True)
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        (draft / CONFIG).write_text(json.dumps(head.config.to_dict(), indent=2) + "\n")
        if draft.parent == folder:
            _replace(folder, draft)
        else:
            draft.rename(folder)
    except (OSError, SafetensorError) as error:
        raise HeadError(f"the head cannot be written to {folder}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_place(folder: str | Path) -> None:
    """Raises HeadError where a head cannot be written to `folder`: to be known before one is made."""
    user_path(folder, HeadError)
    folder = Path(folder).absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise HeadError(f"the head cannot be written to {folder}: {nearest} is a file; name a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise HeadError(f"the head cannot be written to {folder}: {nearest} is not yours to write to; name another directory")
    if (folder / CONFIG).exists() and "variant" not in config_values(folder):
        raise HeadError(f"{folder} holds a model that is not a retrieval head: name another directory for the head")


def _replace(folder: Path, draft: Path) -> None:
    """Move the head in `draft` over the one in `folder`; puts the old one back when that fails."""
    try:
        for name in (CONFIG, WEIGHTS):
            if (folder / name).exists():
                (folder / name).rename(draft / f"old-{name}")
        for name in (WEIGHTS, CONFIG):
            (draft / name).rename(folder / name)
    except OSError:
        for old in draft.glob("old-*"):
            old.replace(folder / old.name.removeprefix("old-"))
        raise


def load_head(
    source: str | Path,
    *,
    target: ModelShape | PreTrainedConfig | str | Path,
    dtype: torch.dtype | None = torch.float32,
    need_map: bool = True,
) -> RetrievalHead:
    """Read a retrieval head for a model.

    Args:
        source: a head directory, the directory of an EAGLE-3 draft, a Hub id of either, or a model with a head of its own
            ('nano', 'smollm2' or a checkpoint directory).
        target: the model it serves: a shape, a transformers config, or a name ('nano', a checkpoint directory, a Hub id).
        dtype: number format of the weights; None keeps that of the stored key projection.
        need_map: refuse a head that has another number of groups than the model has KV heads, and no head map.

    Raises:
        HeadError: no head there, a broken or incomplete file, wrong shapes, NaNs, or a head of another model.
        ModelError: there is no such target.
    """
    shape = shape_of(target)
    folder = head_folder(source)
    values = config_values(folder)
    if "variant" in values:
        config, (stored, _) = HeadConfig.from_dict(values), read_weights([_weights(folder)], lambda name: True)
    else:
        name = folder.name if Path(source).exists() else str(source)
        config, stored = read_draft(folder, values, shape, name=name)
    config.check_target(shape, need_map=need_map)
    with torch.device("meta"):
        head = RetrievalHead(config)
    tensors = _fitting(head, stored, folder)
    kept = dtype or tensors["k_proj.weight"].dtype
    head.load_state_dict({name: tensor.to(kept, copy=True) for name, tensor in tensors.items()}, assign=True)
    return head.to(kept).eval().requires_grad_(False)


def read_config(source: str | Path) -> HeadConfig:
    """The config of a pruned head, by any name that `load_head` takes.

    Raises:
        HeadError: no head there, or a whole draft.
    """
    folder = head_folder(source)
    values = config_values(folder)
    if "variant" not in values:
        raise HeadError(f"{folder} is not a retrieval head: if it is an EAGLE-3 draft, prune it with `specontext head prune`")
    return HeadConfig.from_dict(values)


def stored_size(source: str | Path) -> tuple[int, int]:
    """Number of parameters of a pruned head on disk, and their bytes.

    Raises:
        HeadError: no weights there, a broken file, or tensors that are not those of the head's config.
    """
    folder, config = head_folder(source), read_config(source)
    file = _weights(folder)
    _, shapes = read_weights([file], lambda name: False)
    with torch.device("meta"):
        _check_shapes(RetrievalHead(config), shapes, folder)
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return sum(math.prod(shape) for shape in shapes.values()), file.stat().st_size - 8 - header


def head_folder(source: str | Path) -> Path:
    """The directory of a head or draft; a Hub id is downloaded.

    Raises:
        HeadError: a Hub id that cannot be had, or a model for which no head comes with this package.
    """
    user_path(source, HeadError)
    folder = NANO if str(source) == "nano" else HEADS.get(str(source), Path(source))
    if (folder / OWN_HEAD / CONFIG).is_file():
        return folder / OWN_HEAD
    if str(source) in HEADS and not (folder / CONFIG).is_file():
        raise HeadError(
            f"no retrieval head for '{source}' comes with this version of specontext: name one, or train it with "
            f"`specontext distill {source}`"
        )
    if folder.exists() or isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/")):
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, "*.safetensors", "pytorch_model*.bin"]))
    except (OSError, ValueError) as error:
        raise HeadError(f"no directory {source}, and it cannot be had from the Hub: {in_one_sentence(error)}") from error


def _weights(folder: Path) -> Path:
    if not (folder / WEIGHTS).is_file():
        raise HeadError(f"the retrieval head in {folder} has no {WEIGHTS}{what_is_there(folder)}")
    return folder / WEIGHTS


def _fitting(head: RetrievalHead, stored: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The stored tensors by the head's own names, all of them.

    Raises:
        HeadError: tensors that are missing or not taken, of another shape or number format, or not finite.
    """
    names = _check_shapes(head, {name: tuple(tensor.shape) for name, tensor in stored.items()}, folder)
    for stored_name in names:
        tensor = stored[stored_name]
        if tensor.dtype not in FORMATS:
            raise HeadError(f"{stored_name} holds {tensor.dtype} numbers: a head needs float32, bfloat16 or float16")
        if not torch.isfinite(tensor).all():
            raise HeadError(f"{stored_name} holds values that are not finite numbers")
    return {name: stored[stored_name] for stored_name, name in names.items()}


def _check_shapes(head: RetrievalHead, stored: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, str]:
    """The head's own names of its tensors by those in its file; raises HeadError for others than its config asks for."""
    wanted = {tensor_name(name): (name, parameter) for name, parameter in head.state_dict().items()}
    if extra := sorted(stored.keys() - wanted.keys()):
        raise HeadError(f"the retrieval head in {folder} holds {first_few(extra)}, which a head of its config does not take")
    if missing := [name for name in wanted if name not in stored]:
        raise HeadError(f"the retrieval head in {folder} lacks the tensor{'s' * (len(missing) > 1)} {', '.join(missing)}")
    for stored_name, (name, parameter) in wanted.items():
        if stored[stored_name] != tuple(parameter.shape):
            c = head.config
            width = f" ({len(c.feature_layers)} feature layers of width {c.target_hidden_size})" if name == "fc.weight" else ""
            asked = f"{list(parameter.shape)}{width}"
            raise HeadError(f"{stored_name} has shape {list(stored[stored_name])}, the head's config asks for {asked}")
    return {stored_name: name for stored_name, (name, _) in wanted.items()}
