"""Experts of mixtures as modelling code has them, and with matrices that keep their codes.

A module of experts has a table [experts, outputs, inputs] of each kind of matrix: of gate and up, one behind the other, or of up
alone, and of down. What it computes with them is told by a few attributes that the library's own `use_experts_implementation`
puts there for functions that do it in another way; modules without these are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specontext.kernels.quantized_linear import QuantizedMatrix
from specontext.models.decoder import decoder_layers
from specontext.quantization.linear import QuantizedExperts

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
# What files call an expert's matrices, and the table and place in it where they belong.
PLACES = {"gate_proj": (GATE_UP, 0), "w1": (GATE_UP, 0), "up_proj": (GATE_UP, 1), "w3": (GATE_UP, 1)}
PLACES |= {"down_proj": (DOWN, 0), "w2": (DOWN, 0)}
STORED = re.compile(r".*\blayers\.(?P<layer>\d+)\.(?:[^.]+\.)*experts\.(?P<number>\d+)\.(?P<name>[^.]+)")


@dataclass(frozen=True)
class Experts:
    """A module of experts.

    Attributes:
        path: its name in the model.
        layer: number of the decoder's layer that has it.
        count: experts.
        tables: outputs and inputs of an expert's matrix in each table, by the table's name.
        transposed: whether tables are [experts, inputs, outputs].
        gate_first: whether gate's outputs come before up's; else they alternate.
    """

    path: str
    layer: int
    count: int
    tables: Mapping[str, tuple[int, int]]
    transposed: bool
    gate_first: bool

    @property
    def is_stored_apart(self) -> bool:
        """Whether files in which its matrices are those of linear layers, expert by expert, can be kept as they are."""
        return not self.transposed and self.gate_first

    def names(self) -> dict[str, str]:
        """Tables by the names of their parameters in the model."""
        return {f"{self.path}.{table}": table for table in self.tables}

    def weights(self, table: Tensor) -> Tensor:
        """A parameter as a view [experts, outputs, inputs]."""
        return table.transpose(1, 2) if self.transposed else table


def experts_of(model: PreTrainedModel) -> list[Experts]:
    """The modules of experts whose tables may keep codes."""
    names, found = {id(module): name for name, module in model.named_modules()}, []
    for number, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if tables := _tables(module):
                turned, gate_first = bool(module.is_transposed), bool(module.is_concatenated)
                n, k = (-1, -2) if turned else (-2, -1)
                shapes = {name: (int(table.shape[n]), int(table.shape[k])) for name, table in tables.items()}
                found.append(Experts(names[id(module)], number, len(tables[DOWN]), shapes, turned, gate_first))
    return found


def _tables(module: nn.Module) -> dict[str, Tensor]:
    """A module's tables by name; none where it is no module of experts, or not one whose products are told by attributes."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")):
        return {}
    names = (GATE_UP if module.has_gate else UP, DOWN)
    own = dict(module.named_parameters(recurse=False))
    return {name: own[name] for name in names} if all(name in own and own[name].dim() == 3 for name in names) else {}


def stored_parts(modules: Iterable[str], all_experts: Iterable[Experts]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Which of a checkpoint's modules are the matrices of experts that it has one by one.

    Args:
        modules: names of those with a quantised matrix.

    Returns:
        For each module of experts, by its path, and each of its tables: names of the matrices as they lie in it. Only those
        that are all there, and whose place the names tell.
    """
    found: dict[int, dict[tuple[int, str], str]] = {}
    for module in modules:
        match = STORED.fullmatch(module)
        if match is not None:
            found.setdefault(int(match["layer"]), {})[int(match["number"]), match["name"]] = module
    by_layer: dict[int, list[Experts]] = {}
    for experts in all_experts:
        by_layer.setdefault(experts.layer, []).append(experts)
    taken = {}
    for layer, several in by_layer.items():
        if len(several) == 1 and layer in found and (tables := _in_tables(found[layer], several[0])):
            taken[several[0].path] = tables
    return taken


def _in_tables(matrices: Mapping[tuple[int, str], str], experts: Experts) -> dict[str, tuple[str, ...]]:
    """The names of a layer's matrices in the order in which they lie in tables; none where some are missing or too many."""
    if not experts.is_stored_apart:
        return {}
    placed: dict[str, dict[tuple[int, int], str]] = {table: {} for table in experts.tables}
    for (number, name), module in matrices.items():
        table, place = PLACES.get(name, ("", 0))
        table = UP if table == GATE_UP and GATE_UP not in placed else table
        if table not in placed:
            return {}
        placed[table][number, place] = module
    halves = {GATE_UP: (0, 1), UP: (1,), DOWN: (0,)}
    for table, own in placed.items():
        if sorted(own) != [(number, place) for number in range(experts.count) for place in halves[table]]:
            return {}
    return {table: tuple(own[place] for place in sorted(own)) for table, own in placed.items()}


class CodedExperts(nn.Module):
    """Experts whose tables keep codes, in place of the module that had them as parameters, which it asks for all else.

    The host waits for nothing, and shapes follow from the number of tokens, so that steps can be captured.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """A token's experts, weighted and added up.

        Args:
            hidden_states: [M, K].
            top_k_index: the experts of each token, [M, C].
            top_k_weights: [M, C].
        """
        own: Any = self.own
        into = own.gate_up_proj if own.has_gate else own.up_proj
        x = into(hidden_states, top_k_index)  # [M, C, outputs]
        if own.has_bias:
            x = x + (own.gate_up_proj_bias if own.has_gate else own.up_proj_bias)[top_k_index]
        x = x.flatten(0, 1)
        x = own._apply_gate(x) if own.has_gate else own.act_fn(x)
        x = own.down_proj(x, top_k_index.reshape(-1, 1))  # [M C, 1, K]
        x = x.view(*top_k_index.shape, -1)
        if own.has_bias:
            x = x + own.down_proj_bias[top_k_index]
        if getattr(own, "has_post_expert_norm", False):
            x = own.post_expert_norm(x)
        return (x * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


def with_codes(module: nn.Module) -> nn.Module:
    """A module of experts, so that it computes with its tables where these keep codes."""
    return CodedExperts(module) if isinstance(getattr(module, DOWN, None), QuantizedExperts) else module


def keep_codes(model: nn.Module, experts: Experts, kept: Mapping[str, QuantizedMatrix]) -> None:
    """Put tables that keep codes into a module of experts, in place.

    Args:
        kept: by the names of parameters, at least its own.
    """
    module = model.get_submodule(experts.path)
    for name, table in experts.names().items():
        delattr(module, table)  # a parameter, whose place no module takes
        setattr(module, table, QuantizedExperts(kept[name], experts.count))
    parent, _, last = experts.path.rpartition(".")
    setattr(model.get_submodule(parent), last, with_codes(module))


def stand_in(experts: Experts, table: str, dtype: torch.dtype) -> Tensor:
    """Of a parameter's shape, without memory."""
    n, k = experts.tables[table]
    shape = (experts.count, k, n) if experts.transposed else (experts.count, n, k)
    return torch.zeros((), dtype=dtype).expand(shape)
