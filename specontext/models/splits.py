"""How each table of a decoder's layers is split among ranks: by the modelling code's own plan for tensor parallelism, and where
that says nothing of attention, feed-forward layers, shared experts or gpt-oss, by ours.

What is split by columns of the output ('colwise') computes some heads, or some of the feed-forward's numbers; what takes these in
('rowwise') gives a part of a sum. Routers, norms, embeddings and what keeps a state are whole on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specontext.errors import ModelError
from specontext.kernels.quantized_linear import QuantizedMatrix
from specontext.memory.sharing import Share
from specontext.memory.states import mixers_of
from specontext.model_shape import ModelShape
from specontext.models.decoder import decoder_layers
from specontext.quantization.parts import some_columns, some_rows

WHOLE = "replicated_with_grad_allreduce"
EXPERTS = "moe_tp_experts"  # a module whose result is a part of a sum
ONCE = "once"  # what is added to a sum, and so is zero on all ranks but one
ADVICE = "leave tensor_parallel_size out"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # whose split goes by heads
LATENT_ATTENTION = ("kv_b_proj", "o_proj")  # the same where keys and values are made of latents, which every rank has
PER_KV_HEAD = ("k_proj", "v_proj")
ALSO_CALLED = {"out_proj": "o_proj"}


@dataclass(frozen=True)
class Cut:
    """Which numbers of a table a rank has: of `axis` a consecutive share, or one of each of `tables` equal tables that lie behind
    each other along it."""

    axis: int
    tables: int = 1

    def piece(self, table: Tensor, own: slice) -> Tensor:
        """A rank's numbers, a view where they are consecutive.

        Args:
            own: which of each table's.
        """
        each = table.shape[self.axis] // self.tables
        parts = [table.narrow(self.axis, number * each + own.start, own.stop - own.start) for number in range(self.tables)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axis)

    def codes(self, matrix: QuantizedMatrix, own: slice) -> QuantizedMatrix | None:
        """The same of a matrix of codes; None where these are none that kernels take."""
        if self.axis == ROWS.axis:
            return some_columns(matrix, own) if self.tables == 1 else None
        each = matrix.shape[0] // self.tables
        return some_rows(matrix, [slice(n * each + own.start, n * each + own.stop) for n in range(self.tables)])


COLUMNS, ROWS = Cut(-2), Cut(-1)  # of a weight [outputs, inputs]
STYLES = {"colwise": COLUMNS, "rowwise": ROWS, "packed_colwise": Cut(-2, 2), "packed_rowwise": Cut(-1, 2)}
# What is split otherwise than a plan says: of fused projections of gate and up, whose results the library gathers, each is split
# by itself, and nothing is gathered; what makes latents is whole everywhere, and so are these.
RENAMED = {
    ("gate_up_proj", "colwise_gather_output"): "packed_colwise",
    ("down_proj", "rowwise_split_input"): "rowwise",
    ("kv_a_proj_with_mqa", "mla_kv_a_proj"): WHOLE,
}
GATED = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise", "w1": "colwise", "w3": "colwise", "w2": "rowwise"}
FEED_FORWARD = ("mlp", "feed_forward", "shared_mlp")  # names of modules with these
OURS = {
    "o_proj": "rowwise",
    "out_proj": "rowwise",
    "sinks": "rowwise",
    "q_a_proj": WHOLE,
    "kv_a_proj_with_mqa": WHOLE,
} | dict.fromkeys(("q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj"), "colwise")
# Its experts have their matrices the other way round, and gate and up alternate.
GPT_OSS = {
    "mlp.experts": EXPERTS,
    "mlp.experts.gate_up_proj": "rowwise",
    "mlp.experts.gate_up_proj_bias": "rowwise",
    "mlp.experts.down_proj": "colwise",
    "mlp.experts.down_proj_bias": ONCE,
}


@dataclass(frozen=True)
class Split:
    """A table of weights in a layer, and how ranks share it.

    Attributes:
        owner: the linear layer that it belongs to; for a parameter without one, the module that has it.
        cut: None for the whole, on one rank; zeros on the others.
        kv_heads: of the layer.
    """

    path: str
    owner: nn.Module
    cut: Cut | None
    kv_heads: int

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def table(self) -> nn.Parameter:
        found: Any = self.owner.weight if isinstance(self.owner, nn.Linear) else getattr(self.owner, self.name)
        return found

    def own(self, share: Share) -> slice:
        """Which of a table's numbers along the axis that is cut are a rank's."""
        assert self.cut is not None
        width = self.table.shape[self.cut.axis] // self.cut.tables
        if self.name in PER_KV_HEAD:
            heads, each = share.some_of(self.kv_heads), width // self.kv_heads
            return slice(heads.start * each, heads.stop * each)
        each = width // share.size
        return slice(share.rank * each, (share.rank + 1) * each)

    def codes(self, matrix: QuantizedMatrix, share: Share) -> QuantizedMatrix | None:
        """A rank's part of the table's codes, those of experts one behind the other; None where it is to be written out."""
        assert self.cut is not None
        cut, table = self.cut, self.table
        if table.dim() == 3:
            if getattr(self.owner, "is_transposed", False):
                cut = replace(cut, axis=COLUMNS.axis + ROWS.axis - cut.axis)
            if cut.axis == COLUMNS.axis:
                cut = replace(cut, tables=len(table) * cut.tables)
        return cut.codes(matrix, self.own(share))


@dataclass(frozen=True)
class LayerSplits:
    """What ranks share of a layer.

    Attributes:
        experts: paths of modules whose results they add up.
    """

    layer: nn.Module
    splits: tuple[Split, ...]
    experts: tuple[str, ...]


def splits_of(model: PreTrainedModel, shape: ModelShape, share: Share) -> list[LayerSplits]:
    """How each layer is split.

    Raises:
        ConfigError, ModelError: what cannot be shared among so many ranks; the message names it.
    """
    share.check(shape)
    config = model.config.get_text_config()
    plan = dict(getattr(config, "base_model_tp_plan", None) or {})
    styles = {re.sub(r"^layers\.\*\.", "", name): style for name, style in plan.items()}
    if config.model_type == "gpt_oss":
        styles |= GPT_OSS
    names, near = ATTENTION if shape.latent is None else LATENT_ATTENTION, dict(zip(shape.attentive, shape.windows, strict=False))
    mixers = {id(module) for mixer in mixers_of(model) for module in mixer.modules()}
    found = []
    for number, layer in enumerate(decoder_layers(model)):
        needed = [name for name in (names if number not in shape.inattentive else ()) if not _is_left_out(layer, name)]
        heads = shape.window_heads[0] if shape.window_heads and near.get(number) is not None else shape.kv_heads
        found.append(_splits_of_layer(model, layer, number, styles, share, needed, mixers, heads))
    return found


def _splits_of_layer(
    model: PreTrainedModel,
    layer: nn.Module,
    number: int,
    styles: dict[str, str],
    share: Share,
    needed: Sequence[str],
    whole: Container[int],
    kv_heads: int,
) -> LayerSplits:
    """How one layer is split.

    Args:
        needed: names of linear layers that attention must have.
        whole: ids of modules that every rank has.
        kv_heads: of the layer.
    """
    who = f"a {type(model).__name__} cannot be shared among ranks"
    there = {path.rpartition(".")[2] for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
    there |= {ALSO_CALLED[name] for name in there & ALSO_CALLED.keys()}
    if missing := [name for name in needed if name not in there]:
        raise ModelError(f"{who}: layer {number} has no {missing[0]} of its own that could be split by heads; {ADVICE}")
    splits: list[Split] = []
    experts: list[str] = []
    for path, module in layer.named_modules():
        if id(module) in whole:
            continue
        style = _style(path, styles)
        if style == EXPERTS:
            experts.append(path)
        for name, table in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear)
            where = path if linear else f"{path}.{name}"
            if style == WHOLE or (linear and name == "bias") or _is_whole(model, table, where, styles):
                continue
            how = _style(where, styles)
            if how != ONCE and how not in STYLES:
                raise ModelError(f"{who}: nothing says how its {where} is split ({how or 'not in its plan'}); {ADVICE}")
            splits.append(Split(where, module, STYLES.get(how), kv_heads))
    for split in splits:
        if split.cut is not None and split.name not in ATTENTION:
            width = split.table.shape[split.cut.axis] // split.cut.tables
            if width % share.size:
                raise ModelError(f"{who}: the {width} numbers of {split.path} do not divide by {share.size}; {ADVICE}")
    return LayerSplits(layer, tuple(splits), tuple(experts))


def _is_left_out(layer: nn.Module, name: str) -> bool:
    """Whether a layer's attention says that it has no such projection, as where keys are values too."""
    return any(getattr(module, name, layer) is None for module in layer.modules())


def _style(path: str, styles: dict[str, str]) -> str | None:
    """How the plan, or ours where it says nothing, splits a module or a parameter."""
    *parents, name = path.split(".")
    style = styles.get(path)
    if style is not None:
        return RENAMED.get((name, style), style)
    if parents and (parents[-1] in FEED_FORWARD or parents[-1].startswith("shared_expert")):
        return GATED.get(name)
    return OURS.get(name) if parents and parents[-1].endswith(("attn", "attention")) else None


def _is_whole(model: PreTrainedModel, table: Tensor, path: str, styles: dict[str, str]) -> bool:
    """Whether each rank has all of a table: numbers of a norm, and of routers, which have a row for each expert or one in all."""
    if _style(path, styles) is not None:
        return False
    config: Any = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    rows = {1} | {getattr(config, name, None) for name in names}
    return table.dim() < 2 or (EXPERTS in styles.values() and table.dim() == 2 and table.shape[0] in rows)
