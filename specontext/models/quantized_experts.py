"""Tables of experts that keep their codes: read of files that have the matrices one by one, or rounded when a model is there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specontext.kernels.quantized_linear import QuantizedMatrix, dequantized
from specontext.models.experts import Experts, experts_of, stand_in
from specontext.models.sharding import OfCodes
from specontext.models.weight_sources import Source
from specontext.quantization.made import quantized
from specontext.quantization.parts import joined


def read_tables(
    source: Source, experts: Experts, parts: Mapping[str, OfCodes], device: torch.device
) -> dict[str, QuantizedMatrix]:
    """A module's tables of codes on a device, by the names of its parameters; none where its weights are to be written out.

    Args:
        parts: as of `quantised_model`.
    """
    tables: dict[str, QuantizedMatrix | None] = {}
    for table, names in source.experts.get(experts.path, {}).items():
        matrices = [matrix for name in names if isinstance(matrix := source.matrix(name), QuantizedMatrix)]
        whole = joined(matrices) if len(matrices) == len(names) else None
        n, k = experts.tables[table]
        tables[table] = whole.to(device) if whole is not None and whole.shape == (experts.count * n, k) else None
    return _kept(experts, tables, parts)


@torch.no_grad()
def round_tables(
    model: PreTrainedModel, kind: str, keep_on: torch.device | None, parts: Mapping[str, OfCodes]
) -> dict[str, QuantizedMatrix]:
    """Round a model's experts to 'fp8' or 'int4', one after the other, in place.

    Args:
        keep_on, parts: as of `quantised_model`.

    Returns:
        Tables that keep codes, by the names of parameters, which are stand-ins then; of all others the model has what the codes
        stand for.
    """
    kept: dict[str, QuantizedMatrix] = {}
    for experts in experts_of(model):
        if any(k % 32 for _, k in experts.tables.values()):
            continue
        module = model.get_submodule(experts.path)
        tables = {table: _rounded(experts, getattr(module, table), kind, keep_on) for table in experts.tables}
        found = {} if keep_on is None else _kept(experts, tables, parts)
        for table, matrix in tables.items():
            own: nn.Parameter = getattr(module, table)
            shape = experts.weights(own).shape
            values = (
                stand_in(experts, table, own.dtype)
                if found
                else experts.weights(dequantized(matrix, own.dtype).view(shape)).contiguous().to(own.device)
            )
            setattr(module, table, nn.Parameter(values, requires_grad=False))
        kept |= found
    return kept


def _rounded(experts: Experts, table: Tensor, kind: str, device: torch.device | None) -> QuantizedMatrix:
    matrices = [quantized(weight.to(device or weight.device).contiguous(), kind) for weight in experts.weights(table)]
    whole = joined(matrices)
    assert whole is not None
    return whole


def _kept(
    experts: Experts, tables: Mapping[str, QuantizedMatrix | None], parts: Mapping[str, OfCodes]
) -> dict[str, QuantizedMatrix]:
    """What of the tables is kept, by the names of parameters: all, or a rank's part, where kernels take them; else none."""
    found = {}
    for name, table in experts.names().items():
        matrix = tables.get(table)
        part = parts[name](matrix) if matrix is not None and name in parts else matrix
        if part is None or part.order is not None or not part.group:
            return {}
        found[name] = part
    return found
