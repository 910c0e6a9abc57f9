"""bitsandbytes' 4-bit weights: each code is a place in a table of 16 numbers, each block of the flattened matrix has a scale."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from specontext.errors import ModelError

QUANT_STATE = "weight.quant_state.bitsandbytes__"


def four_bit_matrix(parts: Mapping[str, str], read: Callable[[str], Tensor]) -> Tensor:
    """The matrix [N, K], written out in float32.

    A byte holds two codes, the high half first; bytes may be stored as numbers of any format (`bnb_4bit_quant_storage`). Scales
    may be quantised themselves: codes of 8 bits with scales and an offset.

    Args:
        parts: names of a module's tensors by their endings, as `stored.stored_matrices` gives them.
    """
    state = json.loads(bytes(read(parts[QUANT_STATE]).tolist()))
    size, shape = int(state["blocksize"]), [int(length) for length in state["shape"]]
    packed, table = read(parts["weight"]).flatten().view(torch.uint8), read(parts["weight.quant_map"]).float()
    if len(table) != 16:
        raise ModelError(f"{parts['weight']} is not of bitsandbytes' 4 bits: its table has {len(table)} numbers, not 16")
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: shape[0] * shape[1]]
    scales = read(parts["weight.absmax"])
    if "weight.nested_absmax" in parts:
        nested = read(parts["weight.nested_absmax"]).float().repeat_interleave(int(state["nested_blocksize"]))
        scales = read(parts["weight.nested_quant_map"]).float()[scales.long()] * nested[: len(scales)]
        scales = scales + float(state["nested_offset"])
    spread = scales.float().repeat_interleave(size)[: len(codes)]
    return (table[codes.long()] * spread).view(shape)
