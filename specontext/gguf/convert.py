"""A GGUF file written as an ordinary checkpoint directory: dequantised weights, config, tokenizer, and where they come from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specontext.errors import GGUFError
from specontext.gguf.architecture import as_transformers_has_it, config_of, family_of, parameter_name
from specontext.gguf.reading import PLAIN, GGUFFile, StoredTensor, read_file
from specontext.gguf.source import SOURCE, VERSION
from specontext.gguf.tokenizer import tokenizer_of

SHARD = 4 * 2**30  # bytes of weights that are held in memory and lie in one file
STORED = torch.bfloat16  # of dequantised numbers


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, and the stored tensors that are its parts along the last dimension but one."""

    shape: tuple[int, ...]
    tensors: tuple[StoredTensor, ...]


def convert(path: Path, folder: Path) -> None:
    """Write the model in the GGUF file `path` to `folder`, which exists and is empty.

    Raises:
        GGUFError: a file that cannot be read or is not supported.
        OSError: `folder` cannot be written.
        SafetensorError: the same, while weights are written.
    """
    file = read_file(path)
    with _blamed_on(file):
        config = config_of(file)
        tokenizer, tokenizer_config = tokenizer_of(file)
        dtype = PLAIN.get(file.format, STORED)
        names = _names(file, config)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write(folder / "config.json", config)
    ends: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    _write(folder / "generation_config.json", ends)
    _write(folder / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_weights(file, names, dtype, folder)
    _write(folder / SOURCE, _source(file))


@contextmanager
def _blamed_on(file: GGUFFile) -> Iterator[None]:
    """Turns what metadata of another kind than they should be raise anywhere into a GGUFError."""
    try:
        yield
    except GGUFError:
        raise
    except Exception as error:  # numbers that are texts, lists of another length, sizes that no library takes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise GGUFError(
            f"{file.path} is broken: its metadata cannot be understood ({reason}); download it again, "
            "or take another conversion of the model"
        ) from error


def _names(file: GGUFFile, config: dict[str, Any]) -> dict[str, Parameter]:
    """What the model's parameters are made of, by their own names; raises GGUFError unless they are exactly the model's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = {match[1] for tensor in file.tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))}
    depth = config["num_hidden_layers"]
    if depth > len(layers):  # a model of that many would be made for nothing, if it can be
        raise GGUFError(f"{file.path} is incomplete: it says {depth} layers and has tensors of {len(layers)}")
    values, family = dict(config), family_of(file)
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored: dict[str, list[StoredTensor]] = {}
    for tensor in sorted(file.tensors, key=lambda tensor: tensor.name):  # a gate before what it gates
        try:
            name = parameter_name(family, tensor.name)
        except (KeyError, ValueError):
            name = tensor.name
        if name is not None:
            stored.setdefault(name, []).append(tensor)
    for name, tensors in stored.items():
        found = _joined_shape(tensors)
        if shapes.get(name) not in (found, (1, *found)):
            wanted = f"not {list(shapes[name])}" if name in shapes else "which the model does not have"
            said = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in tensors)
            raise GGUFError(f"{file.path} is not supported: it has a tensor {said}, {wanted}")
    if missing := sorted(set(shapes) - set(stored)):
        raise GGUFError(f"{file.path} is incomplete: it has nothing for {missing[0]}" + " and others" * (len(missing) > 1))
    return {name: Parameter(shape, tuple(stored[name])) for name, shape in shapes.items()}


def _joined_shape(tensors: Sequence[StoredTensor]) -> tuple[int, ...]:
    shape = tensors[0].shape
    if len(tensors) == 1 or len(shape) < 2:
        return shape
    return (*shape[:-2], sum(tensor.shape[-2] for tensor in tensors), shape[-1])


def _write_weights(file: GGUFFile, names: Mapping[str, Parameter], dtype: torch.dtype, folder: Path) -> None:
    shards = list(_shards(names, dtype))
    places: dict[str, str] = {}
    for i, some in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({own: _values(file, names[own], dtype) for own in some}, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(some, name)
    if len(shards) > 1:
        total = sum(math.prod(parameter.shape) for parameter in names.values()) * dtype.itemsize
        _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _shards(names: Mapping[str, Parameter], dtype: torch.dtype) -> Iterator[list[str]]:
    some: list[str] = []
    size = 0
    for name, parameter in names.items():
        bytes_ = math.prod(parameter.shape) * dtype.itemsize
        if some and size + bytes_ > SHARD:
            yield some
            some, size = [], 0
        some.append(name)
        size += bytes_
    yield some


def _values(file: GGUFFile, parameter: Parameter, dtype: torch.dtype) -> Tensor:
    parts = []
    for tensor in parameter.tensors:
        part = torch.tensor(as_transformers_has_it(file, tensor.name, tensor.values())).to(dtype)
        if not torch.isfinite(part).all():
            raise GGUFError(f"{tensor.name} in {file.path} holds values that are not finite numbers")
        parts.append(part)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)).reshape(parameter.shape)


def _source(file: GGUFFile) -> dict[str, Any]:
    quantisation = file.quantisation
    general = ("name", "basename", "size_label", "license", "organization")
    return {
        "file": file.path.name,
        "format": quantisation or file.format,
        "weights": f"dequantised from {quantisation}" if quantisation else f"converted from {file.format}",
        **{key: file.metadata[f"general.{key}"] for key in general if f"general.{key}" in file.metadata},
        "converter": VERSION,
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
