"""The files with a checkpoint's weights, and what their headers say of each tensor; no weights are read."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from specontext.checkpoints.files import Failure, check_file, missing_shards, read_json, shards_of
from specontext.checkpoints.wording import first_few, in_one_sentence
from specontext.errors import shown

SINGLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LOOKED_FOR = ("model.safetensors", SHARDED[0], "pytorch_model.bin", SHARDED[1])  # in the order of transformers
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or expert, in a tensor's name
SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.(safetensors|bin)$")
# Endings of files with weights that are not in Hugging Face's format, and what writes them.
FOREIGN = {
    ".gguf": "GGUF files",
    ".pth": "PyTorch files in their maker's own format",
    ".pt": "PyTorch files in their maker's own format",
    ".npz": "MLX or NumPy files",
    ".msgpack": "Flax files",
    ".h5": "TensorFlow files",
    ".onnx": "ONNX files",
    ".xml": "OpenVINO files",
    ".engine": "TensorRT files",
    ".distcp": "PyTorch's distributed checkpoints",
    ".safetensors": "safetensors files under other names",
    ".bin": "PyTorch files under other names",
}
PLAIN = ("float64", "float32", "bfloat16", "float16")
# PyTorch's names for number formats of safetensors; what is not here keeps its own name.
NUMBERS = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: number format, by PyTorch's name where it has one.
        key: its name in the file, where it goes by another one here.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    key: str | None = None


def weight_files(folder: Path, failure: Failure, *, named: str | None = None) -> list[Path]:
    """The files that transformers reads the weights in a directory from.

    Args:
        named: a file or index that the config names itself.

    Raises:
        failure: there are none, or some of them are missing; the message says which.
    """
    if (folder / "adapter_config.json").exists() and (adapters := sorted(folder.glob("adapter_model.*"))):
        raise failure(
            f"{folder} has a LoRA adapter beside its weights ({adapters[0].name}), which would be left out: move it into a "
            "directory of its own and name that, so that it is merged, or elsewhere if they are meant without it"
        )
    if named is not None and not isinstance(named, str):
        raise failure(f"{folder / 'config.json'} is broken: transformers_weights should name a file, got {shown(named)}")
    for name in (named,) if named else LOOKED_FOR:
        path = folder / name
        if not (path.exists() or path.is_symlink()):
            continue
        if not name.endswith(".index.json"):
            return [path]
        missing = missing_shards(path, failure)
        if not isinstance(read_json(path, failure).get("metadata"), dict):  # transformers asks for it, and for nothing in it
            raise failure(f'{path} has no metadata: download it again, or put "metadata": {{}} beside its weight_map')
        if missing:
            raise failure(f"the weights in {folder} are incomplete: download {first_few(missing)}, which {path.name} names")
        return [folder / shard for shard in shards_of(path, failure)]
    instead = what_is_there(folder) or "; download it too, or run with random weights (--load-format dummy)"
    raise failure(f"no weights in {folder}: {named or ' or '.join(SINGLE)} is not there{instead}")


def what_is_there(folder: Path) -> str:
    """What a directory without the weights that are looked for holds in their place, as the rest of a sentence; may be empty."""
    files = _foreign(folder)
    if shard := next(filter(None, (SHARD.match(file.name) for file in files)), None):
        index = f"{shard[1]}.{shard[3]}.index.json"
        return f", and {index}, which says what lies in {shard[0]} and its like, is missing: download it"
    if files:
        named = first_few([str(file.relative_to(folder)) for file in files])
        if files[0].suffix == ".gguf":
            return f"; to run a GGUF file ({named}), name the file itself"
        return f"; {FOREIGN[files[0].suffix]} ({named}) are not read: take the checkpoint in Hugging Face's format (safetensors)"
    return ""


def _foreign(folder: Path) -> list[Path]:
    """Files that may be weights in another format, the plainest names first; where there are none, of folders inside."""
    kinds = list(FOREIGN)
    found = [file for file in folder.iterdir() if file.suffix in FOREIGN] or [
        file for file in folder.glob("*/*") if file.suffix in FOREIGN and file.suffix not in (".safetensors", ".bin")
    ]
    return sorted(found, key=lambda file: (kinds.index(file.suffix), file))


def read_headers(files: Sequence[Path], failure: Failure) -> dict[str, StoredTensor]:
    """What the files hold, by the names of the tensors.

    Raises:
        failure: a file that is broken, or holds anything but tensors, or two that hold different tensors of one name; the
            message names it.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        check_file(file, failure)
        found = _safetensors(file, failure) if file.suffix == ".safetensors" else _pickle(file, failure)
        for name in sorted(tensors.keys() & found.keys()):
            if not _equal(tensors[name], found[name], name):
                raise failure(
                    f"{name} is in {tensors[name].file.name} and in {file.name} of {file.parent}, with different numbers: "
                    "one of the files belongs to another checkpoint, so download both again"
                )
        tensors |= found
    return tensors


def _equal(one: StoredTensor, other: StoredTensor, name: str) -> bool:
    """Whether two files hold the same numbers by a name."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    import torch

    from specontext.checkpoints.reading import tensor_reader

    first, second = (tensor_reader({name: tensor})(name).contiguous().view(-1) for tensor in (one, other))
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def quantised_numbers(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Number formats, by tensor, of those that do not hold plain floating-point numbers as weights do.

    Masks and positions that old code stored as buffers are none of them.
    """
    return {name: t.dtype for name, t in tensors.items() if t.dtype not in PLAIN and not is_buffer(name, t)}


def is_buffer(name: str, tensor: StoredTensor | None) -> bool:
    """Whether this is a table that code of former days stored and today's computes: RoPE frequencies, masks, positions."""
    last = name.rpartition(".")[2]
    if last in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"):
        return "rotary" in name or "rope" in name
    if last in ("position_ids", "causal_mask", "masked_bias"):
        return True
    size = tensor.shape if tensor is not None else ()
    return last == "bias" and "att" in name and len(size) == 4 and size[:2] == (1, 1) and size[2] == size[3]


def odd_experts(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """What is wrong among the tensors of experts, which must be complete and alike in every layer, in words."""
    groups: dict[str, dict[tuple[str, ...], str]] = defaultdict(dict)  # names by their numbers, by name without numbers
    for name in tensors:
        if ".experts." in name:
            groups[NUMBER.sub("{}", name)][tuple(NUMBER.findall(name))] = name
    everywhere = {numbers for members in groups.values() for numbers in members}
    wrong = []
    for pattern, members in sorted(groups.items()):
        gone = sorted(numbers for numbers in everywhere - members.keys() if len(numbers) == pattern.count("{}"))
        wrong += [f"{pattern.format(*numbers)} is not there" for numbers in gone]
        [(usual, _)] = Counter(tensors[name].shape for name in members.values()).most_common(1)
        for name in members.values():
            if tensors[name].shape != usual:
                wrong.append(f"{name} has shape {list(tensors[name].shape)} and its like have {list(usual)}")
    return wrong


def _safetensors(file: Path, failure: Failure) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="np"):  # checks that header and size agree
            pass
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise failure(f"{file} is broken or truncated: {in_one_sentence(error)}; download it again") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        found[name] = StoredTensor(file, NUMBERS.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
    return found


def _pickle(file: Path, failure: Failure) -> dict[str, StoredTensor]:
    import torch

    try:
        stored: Any = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way
        raise failure(
            f"{file} is broken or truncated, or holds more than tensors: {in_one_sentence(error)}; download it again, "
            "or take the checkpoint as safetensors"
        ) from error
    if not isinstance(stored, Mapping):
        raise failure(f"{file} does not hold tensors by name, but a {type(stored).__name__}: save the model's state_dict")
    if odd := [str(name) for name, value in stored.items() if not isinstance(value, torch.Tensor)]:
        raise failure(f"{file} holds more than tensors ({first_few(odd)}): save the model's state_dict alone")
    found = {}
    for name, tensor in stored.items():
        found[str(name)] = StoredTensor(file, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    return found
