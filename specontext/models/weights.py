"""Weights into a decoder: those of a checkpoint, every one of them and nothing beside, or random ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from specontext.checkpoints.adapters import CONFIG as ADAPTER
from specontext.checkpoints.quantization import ADVICE, dequantised
from specontext.checkpoints.weights import PLAIN, odd_experts, quantised_numbers, read_headers, weight_files
from specontext.checkpoints.wording import first_few
from specontext.errors import ModelError
from specontext.locations import folder_of, one_sentence, part_of
from specontext.models.attention import ATTENTION_NAME
from specontext.models.language_model import NAMES, causal_class, made_model, of_decoder
from specontext.models.reports import SCALES, Tensors, check_report, no_report

PACKED = ("_blocks", "_scales")  # of MXFP4: numbers of 4 bits, and an exponent for each 32 of them


def stored_model(source: Path | str, config: PreTrainedConfig, dtype: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """The decoder with the checkpoint's weights.

    Args:
        options: `trust_remote_code` and `revision`.

    Raises:
        ModelError: files that are missing or broken, weights in a format that needs more than reading, and tensors that the
            decoder lacks, does not take or has in another shape; the message names them.
    """
    stored: Tensors | None = None
    packed = PACKED if dequantised(config.to_dict()) else ()
    if isinstance(source, Path):  # before the long work of reading; a Hub id's files come with it
        stored = weight_headers(source, config)
        check_numbers(stored, packed)
        tie_as_stored(config, stored)
    failed = f"cannot load the model {source}"
    with no_report(), one_sentence(failed), naming_experts(source, stored or {}), _without_adapter(source) as seen:
        try:
            loaded: Any = causal_class(config).from_pretrained(
                seen,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below by name
                **({"key_mapping": NAMES} if part_of(config) else {}),
                **({"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}),
                **options,
            )
        except KeyError as error:
            if error.args == (ATTENTION_NAME,):  # a class that looks attention up in a list of its own
                raise ModelError(f"cannot load the model {source}: its attention cannot be exchanged") from error
            raise
    if stored is None:
        stored = weight_headers(folder_of(source, revision=options["revision"]), config)
        check_numbers(stored, packed)
    model, report = loaded
    check_report(source, model, report, stored)
    kept: PreTrainedModel = model
    return kept


@contextmanager
def naming_experts(source: object, stored: Tensors) -> Iterator[None]:
    """Raises ModelError where the library cannot put a checkpoint's experts together; the message says which tensors are odd."""
    try:
        yield
    except RuntimeError as error:
        if "CONVERSION" in str(error) and (wrong := odd_experts(stored)):
            raise ModelError(f"the weights of {source} do not fit together: {first_few(wrong)}") from error
        raise


def tie_as_stored(config: PreTrainedConfig, stored: Tensors) -> None:
    """Have the decoder of a checkpoint that reads images too share its embedding where the files have one alone: of the two
    configs that speak of it either may be wrong."""
    if part_of(config):
        config.tie_word_embeddings = config._may_be_tied and not any(name.endswith("lm_head.weight") for name in stored)


@contextmanager
def _without_adapter(source: Path | str) -> Iterator[Path | str]:
    """Where the model is read from: `source`, or links to its files without the config of an adapter that is merged already,
    which transformers would load where peft is installed."""
    if not isinstance(source, Path) or not (source / ADAPTER).exists():
        yield source
        return
    with TemporaryDirectory() as folder:
        for file in source.iterdir():
            if file.name != ADAPTER:
                (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Inside, random numbers are the same every time, and nobody else's change."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def random_model(config: PreTrainedConfig, dtype: str, device: torch.device, options: Mapping[str, Any]) -> PreTrainedModel:
    """The decoder with random weights, the same every time.

    Raises:
        ModelError: transformers cannot build it.
    """
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    failed = f"cannot build the model of {config.name_or_path or 'this config'}"
    with one_sentence(failed), seeded(device), torch.device(device):
        wanted = own if dtype == "auto" else getattr(torch, dtype)
        return made_model(config, options, dtype=wanted, attn_implementation=ATTENTION_NAME)


def stored_format(folder: Path, config: PreTrainedConfig) -> str | None:
    """The number format of most of a checkpoint's weights; None where they are made of others when they are read.

    Raises:
        ModelError: files that are missing or broken.
    """
    if dequantised(config.to_dict()):
        return None
    sizes: Counter[str] = Counter()
    for tensor in weight_headers(folder, config).values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    most = max(PLAIN, key=sizes.__getitem__)
    return most if sizes[most] else None


def weight_headers(folder: Path, config: PreTrainedConfig) -> Tensors:
    """What the files of a checkpoint hold; raises ModelError for broken or missing ones."""
    named = getattr(config, "transformers_weights", None)
    return read_headers(weight_files(folder, ModelError, named=named), ModelError)


def decoder_headers(folder: Path, config: PreTrainedConfig) -> Tensors:
    """The same of the decoder alone, by its own names."""
    stored = weight_headers(folder, config)
    return of_decoder(stored) if part_of(config) else stored


def check_numbers(stored: Tensors, packed: tuple[str, ...] = ()) -> None:
    """Raises ModelError, naming tensors, where numbers in the files stand for others: 8 or 4 bits, integers, packed ones.

    Args:
        packed: endings of the names of those that are dequantised.
    """
    odd = {name: number for name, number in quantised_numbers(stored).items() if not (packed and name.endswith(packed))}
    if not odd:
        return
    name, number = next(iter(odd.items()))
    beside = [other for other in stored if other not in odd and SCALES.search(other.rpartition(".")[2])]
    scales = f", with scales such as {first_few(beside)} that would be left out" if beside else ""
    more = f" and {len(odd) - 1} more tensors" if len(odd) > 1 else ""
    raise ModelError(
        f"quantised weights are not supported: {name} ({number}){more} in {stored[name].file} hold no plain floating-point "
        f"numbers{scales}; {ADVICE}"
    )
