"""One rank's part of a decoder: some rows or columns of its layers' tables, as `splits.py` says, and of the output layer's.

Nothing but that part is copied: tables that are mapped from a file are read where they are a rank's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specontext.kernels.quantized_linear import QuantizedMatrix
from specontext.locations import one_sentence
from specontext.memory.sharing import Share
from specontext.model_shape import ModelShape
from specontext.models.experts import with_codes
from specontext.models.head_norms import eps_of
from specontext.models.rank_heads import count_heads
from specontext.models.rank_layers import GatheredLinear, NormOfAllHeads, SummedExperts, SummedLinear, initialize
from specontext.models.ranks import Ranks
from specontext.models.split_styles import NORM_OF_ALL_HEADS, QUERIES
from specontext.models.splits import LayerSplits, Split, splits_of
from specontext.models.weights import random_model, seeded
from specontext.quantization.linear import QuantizedExperts, QuantizedLinear

OfCodes = Callable[[QuantizedMatrix], QuantizedMatrix | None]  # a rank's part of a matrix; None where it is to be written out


class Placing:
    """Puts numbers of a model where they are computed with, in the format in which it runs.

    Args:
        dtype: None leaves formats as they are. What the library keeps in float32 beside a format is in float32.
        codes: of linear layers and experts' tables that keep their codes this rank's part, by their names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype | None,
        codes: Mapping[str, QuantizedMatrix] | None = None,
    ) -> None:
        self.device, self.dtype, self.codes = device, dtype, codes or {}
        kept = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())} if dtype != torch.float32 else set()
        if dtype == torch.float16:
            kept |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
        self._kept = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in kept) or r"(?!)")

    def __call__(self, name: str, numbers: Tensor, *, copy: bool = False) -> nn.Parameter:
        """A parameter, by its name in the model.

        Args:
            copy: own memory in any case, so that nothing else of what it is a view of stays.
        """
        dtype = self.dtype or numbers.dtype
        if self.dtype is not None and self._kept.search(name):
            dtype = torch.float32
        placed = numbers.detach().to(self.device, dtype, copy=copy, memory_format=torch.contiguous_format)
        return nn.Parameter(placed, requires_grad=False)


def parts_of_codes(model: PreTrainedModel, shape: ModelShape, share: Share) -> dict[str, OfCodes]:
    """What a rank has of the matrices that keep their codes, by the names of linear layers and of experts' parameters.

    Raises:
        SpeContextError: as of `splits_of`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, OfCodes] = {}
    for layer in splits_of(model, shape, share):
        for split in layer.splits:
            if split.stretches and (isinstance(split.owner, nn.Linear) or split.table.dim() == 3):
                found[f"{names[id(layer.layer)]}.{split.path}"] = partial(split.codes, share=share)
    return found


def shard(
    model: PreTrainedModel,
    shape: ModelShape,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype | None = None,
    kept: Mapping[str, QuantizedMatrix] | None = None,
) -> None:
    """Leave of a whole model what one rank has, in place, on a device.

    Args:
        dtype: the format in which it runs; None for the one that it has.
        kept: of linear layers and experts' tables that keep their codes this rank's part, by their names; the model has stand-ins
            for them.

    Raises:
        SpeContextError: as of `splits_of`.
    """
    layers, placed = splits_of(model, shape, ranks.share), Placing(model, device, dtype, kept)
    names = {id(module): name for name, module in model.named_modules()}
    for splits in layers:
        _shard_layer(splits, names[id(splits.layer)], ranks, placed)
    _place(model, placed)
    _share_output(model, ranks, placed)


def _shard_layer(layer: LayerSplits, prefix: str, ranks: Ranks, placed: Placing) -> None:
    for split in layer.splits:
        parent, _, name = split.path.rpartition(".")
        home = layer.layer.get_submodule(parent)
        own = _part(split, f"{prefix}.{split.path}", ranks, placed)
        if isinstance(own, QuantizedExperts):
            delattr(home, name)  # a parameter, whose place no module takes
        setattr(home, name, own)
        if name in QUERIES:
            count_heads(home, layer.heads, ranks.share)
    for path in layer.experts:
        parent, _, name = path.rpartition(".")
        experts = with_codes(layer.layer.get_submodule(path))
        setattr(layer.layer.get_submodule(parent), name, SummedExperts(experts, ranks))


def _part(split: Split, path: str, ranks: Ranks, placed: Placing) -> nn.Module | nn.Parameter:
    if not split.stretches:
        whole = placed(path, split.table)
        return whole if ranks.share.rank == 0 else nn.Parameter(torch.zeros_like(whole), requires_grad=False)
    if split.is_linear:
        return _linear(split, path, ranks, placed)
    if path in placed.codes:
        return QuantizedExperts(placed.codes[path], len(split.table))
    own = placed(path, split.piece(split.table, ranks.share), copy=True)
    return NormOfAllHeads(own, eps_of(split.owner), ranks) if split.style == NORM_OF_ALL_HEADS else own


def _linear(split: Split, path: str, ranks: Ranks, placed: Placing) -> nn.Module:
    """A rank's part of a linear layer."""
    found: Any = split.owner.bias
    if split.is_summed:
        bias = None if found is None else placed(path, found)
        return SummedLinear(_product(split, path, None, ranks, placed), bias, ranks)
    bias = None if found is None else placed(path, split.piece(found[:, None], ranks.share)[:, 0], copy=True)
    return _product(split, path, bias, ranks, placed)


def _product(split: Split, path: str, bias: nn.Parameter | None, ranks: Ranks, placed: Placing) -> nn.Module:
    if path in placed.codes:
        return QuantizedLinear(placed.codes[path], None if bias is None else bias.data)
    weight = placed(path, split.piece(split.table, ranks.share), copy=True)
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    part.weight, part.bias = weight, bias  # type: ignore[assignment]  # it has none, or this one
    return part


def _place(model: PreTrainedModel, placed: Placing) -> None:
    """Put what is whole on every rank in its place; tables that are one stay one."""
    done: dict[Tensor, nn.Parameter] = {}
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings() if has_split_output(model) else None
    for path, module in model.named_modules():
        for name, own in list(module.named_parameters(recurse=False)):
            if module is output and own is not table:
                continue  # a rank has a part of it
            if own not in done:
                done[own] = placed(f"{path}.{name}", own)
            setattr(module, name, done[own])
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(placed.device)


def has_split_output(model: PreTrainedModel) -> bool:
    """Whether ranks have parts of the output layer: whatever is done with its outputs is done when they are gathered."""
    return type(model.get_output_embeddings()) is nn.Linear


def _share_output(model: PreTrainedModel, ranks: Ranks, placed: Placing) -> None:
    if not has_split_output(model):
        return
    output: Any = model.get_output_embeddings()
    own = ranks.share.outputs(output.out_features)
    path = next(name for name, module in model.named_modules() if module is output)
    tied = output.weight is model.get_input_embeddings().weight
    weight = output.weight if tied else placed(path, output.weight[own], copy=True)
    bias = None if output.bias is None else placed(path, output.bias[own], copy=True)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, GatheredLinear(weight, bias, own, output.out_features, ranks))


def random_part(
    config: PreTrainedConfig, dtype: str, device: torch.device, options: Mapping[str, Any], ranks: Ranks
) -> PreTrainedModel:
    """A rank's part with random weights: what all ranks have is the same on all, and the whole is nowhere.

    Its parts are not those of the model that one process makes.

    Raises:
        ModelError: transformers cannot build it.
    """
    model = random_model(config, dtype, torch.device("meta"), options)
    shard(model, ModelShape.from_config(config, model.dtype), ranks, torch.device("meta"))
    with one_sentence(f"cannot build the model of {config.name_or_path or 'this config'}"), seeded(device):
        model.to_empty(device=device)
        model.initialize_weights()
        initialize(model)
    return model
