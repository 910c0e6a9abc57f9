"""One rank's part of a decoder: rows or columns of its linear layers, by the modelling code's own plan for tensor parallelism.

What is split by columns of the output ('colwise') computes some heads, or some of the feed-forward's numbers; what takes these in
('rowwise') gives a part of the sum, and the ranks' parts are added up. Everything else is whole on every rank.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specontext.core import ModelShape
from specontext.errors import ModelError
from specontext.memory.sharing import Share
from specontext.models.decoder import decoder_layers
from specontext.models.ranks import Ranks

COLUMNS, ROWS, WHOLE = "colwise", "rowwise", "replicated_with_grad_allreduce"
ADVICE = "leave tensor_parallel_size out"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # whose split goes by heads


class SummedLinear(nn.Module):
    """A linear layer of which each rank has some columns: the ranks' results are added up."""

    def __init__(self, part: nn.Linear, bias: Tensor | None, ranks: Ranks) -> None:
        super().__init__()
        self.part, self.ranks = part, ranks
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.part(x)
        self.ranks.sum_(result)
        return result if self.bias is None else result + self.bias


def check_can_share(model: PreTrainedModel, shape: ModelShape, share: Share) -> None:
    """Raises ConfigError or ModelError, which name it, for what cannot be shared among so many ranks."""
    share.check(shape)
    for layer, named in enumerate(_plans(model)):
        if missing := [name for name in ATTENTION if not any(path.endswith(name) for path in named)]:
            raise ModelError(
                f"{_who(model)}: layer {layer} has no {missing[0]} of its own that could be split by heads; {ADVICE}"
            )
        for path, (module, style) in named.items():
            if style not in (COLUMNS, ROWS) or not isinstance(module, nn.Linear):
                raise ModelError(f"{_who(model)}: nothing says how its {path} is split ({style or 'not in its plan'}); {ADVICE}")
            width = module.out_features if style == COLUMNS else module.in_features
            if not path.endswith(ATTENTION) and width % share.size:
                raise ModelError(f"{_who(model)}: the {width} numbers of {path} do not divide by {share.size}; {ADVICE}")


def shard(model: PreTrainedModel, shape: ModelShape, ranks: Ranks) -> None:
    """Leave of a whole model what one rank has, in place.

    Raises:
        SpeContextError: as of `check_can_share`.
    """
    check_can_share(model, shape, ranks.share)
    for layer, named in zip(decoder_layers(model), _plans(model), strict=True):
        for path, (module, style) in named.items():
            assert isinstance(module, nn.Linear)
            own = _own(path, module.out_features if style == COLUMNS else module.in_features, shape, ranks.share)
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, _part(module, style or "", own, ranks))


def _own(path: str, width: int, shape: ModelShape, share: Share) -> slice:
    """Which outputs, or inputs, of a layer are this rank's."""
    if path.endswith(("k_proj", "v_proj")):
        heads, each = share.kv_heads(shape), width // shape.kv_heads
        return slice(heads.start * each, heads.stop * each)
    each = width // share.size
    return slice(share.rank * each, (share.rank + 1) * each)


def _part(module: nn.Linear, style: str, own: slice, ranks: Ranks) -> nn.Module:
    weight = module.weight[own] if style == COLUMNS else module.weight[:, own]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    part.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if style == ROWS:
        return SummedLinear(part, None if module.bias is None else module.bias.detach(), ranks)
    if module.bias is not None:
        part.bias = nn.Parameter(module.bias.detach()[own].clone(), requires_grad=False)
    return part


def _plans(model: PreTrainedModel) -> list[dict[str, tuple[nn.Module, str | None]]]:
    """Of every layer the modules with tables of weights, by path: each with its style, None where the plan has none."""
    config = model.config.get_text_config()
    plan = getattr(config, "base_model_tp_plan", None) or {}
    styles = {re.sub(r"^layers\.\*\.", "", name): style for name, style in plan.items()}
    found = []
    for layer in decoder_layers(model):
        named: dict[str, tuple[nn.Module, str | None]] = {}
        for path, module in layer.named_modules():
            style = styles.get(path)
            if style == WHOLE:
                continue
            tables = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
            if tables or style is not None:
                named[path] = (module, style)
        named |= {path: (layer, styles[path]) for path, _ in layer.named_parameters() if path in styles}  # such as sinks of heads
        found.append(named)
    return found


def _who(model: PreTrainedModel) -> str:
    return f"a {type(model).__name__} cannot be shared among ranks"
