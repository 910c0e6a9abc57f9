"""Layers of a rank's part of a model: each has some of the numbers of the whole one, and gives what the whole one gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from specontext.models.ranks import Ranks


class SummedLinear(nn.Module):
    """A linear layer of which each rank has some columns: the ranks' results are added up."""

    def __init__(self, part: nn.Module, bias: nn.Parameter | None, ranks: Ranks) -> None:
        super().__init__()
        self.part, self.ranks, self.bias = part, ranks, bias

    @property
    def weight(self) -> Any:
        """A rank's columns, which modelling code may give random numbers by this name."""
        return self.part.weight

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


class NormOfAllHeads(nn.Module):
    """A norm by the root mean square of all heads' numbers, of which each rank has those of as many heads.

    Where several ranks have the same head, the mean over all that they have is still that of the heads.

    Args:
        weight: factors of a rank's own numbers.
    """

    def __init__(self, weight: nn.Parameter, eps: float, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.eps, self.ranks = weight, eps, ranks

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean = wide.square().mean(-1, keepdim=True)
        self.ranks.mean_(mean)
        return (self.weight * (wide * torch.rsqrt(mean + self.eps))).to(x.dtype)


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


def gathers(model: PreTrainedModel) -> bool:
    """Whether ranks have parts of the output layer, so that all have the same logits."""
    return isinstance(model.get_output_embeddings(), GatheredLinear)


def outputs_read(output: nn.Module) -> int:
    """Numbers of an output layer's table that a step reads here."""
    table: Any = output.rows if isinstance(output, GatheredLinear) else output.weight
    return int(table.numel())


@torch.no_grad()
def initialize(model: PreTrainedModel) -> None:
    """Random numbers for these layers, which the library does not know; those of linear layers inside of them it does."""
    for module in model.modules():
        if isinstance(module, SummedLinear) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, NormOfAllHeads):
            module.weight.fill_(1)
    output: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings().weight
    if isinstance(output, GatheredLinear):
        if output.weight.shape == table.shape:
            output.weight = table
        else:
            output.weight.normal_(std=float(table.std()))
        if output.bias is not None:
            output.bias.zero_()
