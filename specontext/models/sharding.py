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
from torch.nn.functional import linear
from transformers import PreTrainedConfig, PreTrainedModel

from specontext.kernels.quantized_linear import QuantizedMatrix
from specontext.locations import one_sentence
from specontext.memory.sharing import Share
from specontext.model_shape import ModelShape
from specontext.models.experts import with_codes
from specontext.models.ranks import Ranks
from specontext.models.splits import ROWS, LayerSplits, Split, splits_of
from specontext.models.weights import random_model, seeded
from specontext.quantization.linear import QuantizedExperts, QuantizedLinear

OfCodes = Callable[[QuantizedMatrix], QuantizedMatrix | None]  # a rank's part of a matrix; None where it is to be written out
GATHERED = ("colwise_gather_output", "colwise_rep")  # of an output layer, old and new


class SummedLinear(nn.Module):
    """A linear layer of which each rank has some columns: the ranks' results are added up."""

    def __init__(self, part: nn.Module, bias: nn.Parameter | None, ranks: Ranks) -> None:
        super().__init__()
        self.part, self.ranks, self.bias = part, ranks, bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.part(x)
        self.ranks.sum_(result)
        return result if self.bias is None else result + self.bias


class SummedExperts(nn.Module):
    """Experts of each of which a rank has some columns: the ranks' results are added up."""

    def __init__(self, part: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.part, self.ranks = part, ranks

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        result: Tensor = self.part(*arguments, **options)
        self.ranks.sum_(result)
        return result


class GatheredLinear(nn.Module):
    """An output layer of which each rank computes some rows, and gets those of all.

    Args:
        weight: a rank's rows, or the whole table where it is the embeddings' too.
        own: which of the outputs are this rank's.
        width: outputs of all ranks.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, own: slice, width: int, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.bias, self.own, self.width, self.ranks = weight, bias, own, width, ranks

    @property
    def rows(self) -> Tensor:
        """The rows that are this rank's."""
        return self.weight[self.own] if len(self.weight) == self.width else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.gather(linear(x, self.rows, self.bias), self.width)


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
            if split.cut is not None and (isinstance(split.owner, nn.Linear) or split.table.dim() == 3):
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
        _shard_layer(splits, names[id(splits.layer)], shape, ranks, placed)
    _place(model, placed)
    _share_output(model, ranks, placed)


def _shard_layer(splits: LayerSplits, prefix: str, shape: ModelShape, ranks: Ranks, placed: Placing) -> None:
    part = ranks.share.shape(shape)
    for split in splits.splits:
        parent, _, name = split.path.rpartition(".")
        home = splits.layer.get_submodule(parent)
        own = _part(split, f"{prefix}.{split.path}", shape, ranks, placed)
        if isinstance(own, QuantizedExperts):
            delattr(home, name)  # a parameter, whose place no module takes
        setattr(home, name, own)
        if hasattr(home, "num_key_value_groups") and shape.latent is None:  # a head has keys and values of its own there
            some = ranks.share.some_of(split.kv_heads)
            home.num_key_value_groups = part.query_heads // (some.stop - some.start)
    for path in splits.experts:
        parent, _, name = path.rpartition(".")
        experts = with_codes(splits.layer.get_submodule(path))
        setattr(splits.layer.get_submodule(parent), name, SummedExperts(experts, ranks))


def _part(split: Split, path: str, shape: ModelShape, ranks: Ranks, placed: Placing) -> nn.Module | nn.Parameter:
    if split.cut is None:
        whole = placed(path, split.table)
        return whole if ranks.share.rank == 0 else nn.Parameter(torch.zeros_like(whole), requires_grad=False)
    own = split.own(ranks.share)
    if not isinstance(split.owner, nn.Linear):
        if path in placed.codes:
            return QuantizedExperts(placed.codes[path], len(split.table))
        return placed(path, split.cut.piece(split.table, own), copy=True)
    bias: nn.Parameter | None = split.owner.bias
    if split.cut == ROWS:
        return SummedLinear(_linear(split, path, own, None, placed), None if bias is None else placed(path, bias), ranks)
    if bias is not None:
        bias = placed(path, split.cut.piece(bias[:, None], own)[:, 0], copy=True)
    return _linear(split, path, own, bias, placed)


def _linear(split: Split, path: str, own: slice, bias: nn.Parameter | None, placed: Placing) -> nn.Module:
    """A rank's part of a linear layer."""
    if path in placed.codes:
        return QuantizedLinear(placed.codes[path], None if bias is None else bias.data)
    assert split.cut is not None
    weight = placed(path, split.cut.piece(split.table, own), copy=True)
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
    """Whether the library's plan has the output layer split by its outputs, which are then gathered."""
    output = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is output), None)
    plan: Any = getattr(type(model), "_tp_plan", None) or {}
    return isinstance(output, nn.Linear) and plan.get(name) in GATHERED


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


def gathers(model: PreTrainedModel) -> bool:
    """Whether ranks have parts of the output layer, so that all have the same logits."""
    return isinstance(model.get_output_embeddings(), GatheredLinear)


def outputs_read(output: nn.Module) -> int:
    """Numbers of an output layer's table that a step reads here."""
    table: Any = output.rows if isinstance(output, GatheredLinear) else output.weight
    return int(table.numel())


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
        _initialize(model)
    return model


@torch.no_grad()
def _initialize(model: PreTrainedModel) -> None:
    """Random numbers for the layers of ranks, which the library does not know."""
    for module in model.modules():
        if isinstance(module, SummedLinear) and module.bias is not None:
            module.bias.zero_()
    output: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings().weight
    if isinstance(output, GatheredLinear):
        if output.weight.shape == table.shape:
            output.weight = table
        else:
            output.weight.normal_(std=float(table.std()))
        if output.bias is not None:
            output.bias.zero_()
