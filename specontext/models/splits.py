"""Which numbers of each table of a decoder's layers one rank has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specontext.errors import ModelError
from specontext.kernels.quantized_linear import QuantizedMatrix
from specontext.memory.sharing import Share
from specontext.model_shape import ModelShape
from specontext.models.decoder import decoder_layers
from specontext.models.head_norms import style_of_norm
from specontext.models.rank_heads import Heads
from specontext.models.split_styles import (
    COLUMNS,
    EXPERTS,
    FEED_FORWARD,
    NORM_OF_ALL_HEADS,
    ONCE,
    PACKED_COLUMNS,
    PACKED_ROWS,
    QUERY_KEY_VALUE,
    ROWS,
    WHOLE,
    Styles,
)
from specontext.quantization.parts import some_columns, some_rows

ADVICE = "leave tensor_parallel_size out"
OUTPUTS, INPUTS = -2, -1  # axes of a weight
AXES = {
    **dict.fromkeys((COLUMNS, PACKED_COLUMNS, QUERY_KEY_VALUE), OUTPUTS),
    **dict.fromkeys((ROWS, PACKED_ROWS, NORM_OF_ALL_HEADS), INPUTS),
}
PER_KV_HEAD = {"k_proj", "v_proj", "k_norm", "k_layernorm"}
LINEAR = nn.Linear | Conv1D


@dataclass(frozen=True)
class Stretch:
    """Consecutive numbers along the axis that is cut, of which ranks have those of their KV heads, or equal shares.

    Attributes:
        kv_heads: whose numbers they are; None for equal shares.
    """

    width: int
    kv_heads: int | None = None

    def own(self, share: Share) -> slice:
        """Which of them are a rank's."""
        if self.kv_heads is None:
            each = self.width // share.size
            return slice(share.rank * each, (share.rank + 1) * each)
        heads, each = share.some_of(self.kv_heads), self.width // self.kv_heads
        return slice(heads.start * each, heads.stop * each)


@dataclass(frozen=True)
class Split:
    """A table of weights in a layer, and how ranks share it.

    Attributes:
        path: in the layer, of the linear layer or the norm over all heads that it belongs to; else of the parameter itself.
        owner: that linear layer or norm; of another parameter the module that has it.
        table: the numbers; of a linear layer [outputs, inputs].
        style: one of `split_styles`.
        stretches: what lies behind each other along the axis that is cut; none where one rank has the whole, and others zeros.
    """

    path: str
    owner: nn.Module
    table: Tensor
    style: str
    stretches: tuple[Stretch, ...]

    @property
    def is_linear(self) -> bool:
        return isinstance(self.owner, LINEAR)

    @property
    def is_summed(self) -> bool:
        """Whether a linear layer's part gives a part of a sum."""
        return AXES[self.style] == INPUTS

    def own(self, share: Share) -> list[slice]:
        """Which numbers along the axis that is cut are a rank's."""
        starts = accumulate((stretch.width for stretch in self.stretches), initial=0)
        pairs = zip(starts, (stretch.own(share) for stretch in self.stretches), strict=False)
        return [slice(start + own.start, start + own.stop) for start, own in pairs]

    def piece(self, table: Tensor, share: Share) -> Tensor:
        """A rank's numbers of a table that is cut as this one is, a view where they are consecutive."""
        axis = AXES[self.style]
        parts = [table.narrow(axis, own.start, own.stop - own.start) for own in self.own(share)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def codes(self, matrix: QuantizedMatrix, share: Share) -> QuantizedMatrix | None:
        """The same of a matrix of codes, those of experts one below the other; None where these are none that kernels take."""
        own, axis = self.own(share), AXES[self.style]
        if self.table.dim() == 3:
            if getattr(self.owner, "is_transposed", False):
                axis = OUTPUTS + INPUTS - axis
            if axis == OUTPUTS:
                each = matrix.shape[0] // len(self.table)
                own = [slice(e * each + one.start, e * each + one.stop) for e in range(len(self.table)) for one in own]
        if axis == OUTPUTS:
            return some_rows(matrix, own)
        return some_columns(matrix, own[0]) if len(own) == 1 else None


@dataclass(frozen=True)
class LayerSplits:
    """What ranks share of a layer.

    Attributes:
        experts: paths of modules whose results they add up.
    """

    layer: nn.Module
    heads: Heads
    splits: tuple[Split, ...]
    experts: tuple[str, ...]


def splits_of(model: PreTrainedModel, shape: ModelShape, share: Share) -> list[LayerSplits]:
    """How each layer is split.

    Raises:
        ConfigError, ModelError: what cannot be shared among so many ranks; the message names it.
    """
    share.check(shape)
    styles, near = Styles(model), dict(zip(shape.attentive, shape.windows, strict=False))
    found = []
    for number, layer in enumerate(decoder_layers(model)):
        kv_heads = shape.window_heads[0] if shape.window_heads and near.get(number) is not None else shape.kv_heads
        heads = Heads(shape.query_heads, shape.query_heads if shape.latent else kv_heads)
        try:
            splits = tuple(_splits_of_layer(layer, styles, heads))
            _check_widths(splits, share)
        except ModelError as error:
            raise ModelError(f"a {type(model).__name__} cannot be shared among ranks: {error}; {ADVICE}") from None
        experts = tuple(path for path, _ in layer.named_modules() if styles.of(path) == EXPERTS)
        found.append(LayerSplits(layer, heads, splits, experts))
    return found


def _splits_of_layer(layer: nn.Module, styles: Styles, heads: Heads) -> Iterator[Split]:
    for path, module in layer.named_modules():
        for name, table in module.named_parameters(recurse=False):
            linear = isinstance(module, LINEAR)
            if styles.keeps_whole(module) or (linear and name == "bias"):
                continue
            where = path if linear else f"{path}.{name}"
            style = style_of_norm(layer, path, table, heads) or styles.of(where)
            if style == WHOLE or (style is None and styles.leaves_whole(table, where)):
                continue
            if style != ONCE and style not in AXES:
                raise ModelError(f"nothing says how its {where} is split ({style or 'not in its plan'})")
            numbers = table.t() if isinstance(module, Conv1D) else table
            stretches = () if style == ONCE else _stretches(style, where, numbers.shape[AXES[style]], heads)
            yield Split(path if style == NORM_OF_ALL_HEADS else where, module, numbers, style, stretches)


def _stretches(style: str, path: str, width: int, heads: Heads) -> tuple[Stretch, ...]:
    if style == QUERY_KEY_VALUE:
        each = width // (heads.query + 2 * heads.kv)
        return Stretch(heads.query * each), *(Stretch(heads.kv * each, heads.kv) for _ in range(2))
    if style in (PACKED_COLUMNS, PACKED_ROWS):
        return (Stretch(width // 2),) * 2
    return (Stretch(width, heads.kv if PER_KV_HEAD.intersection(path.split(".")) else None),)


def _check_widths(splits: Sequence[Split], share: Share) -> None:
    """Raises ModelError for tables that do not divide, and feed-forward layers that take in other numbers than they bring."""
    taken = {split.path.rpartition(".")[0]: split for split in splits if split.style == ROWS and split.is_linear}
    for split in splits:
        for stretch in split.stretches:
            if stretch.kv_heads is None and stretch.width % share.size:
                raise ModelError(f"the {stretch.width} numbers of {split.path} do not divide by {share.size}")
        parent, _, name = split.path.rpartition(".")
        if name in FEED_FORWARD and parent in taken and split.stretches[0].width != taken[parent].stretches[0].width:
            other = taken[parent].path
            raise ModelError(f"nothing says how its {split.path} is split, of whose outputs {other} takes another number")
