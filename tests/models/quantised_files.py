"""Small checkpoints in the exact formats of quantised weights, and what their weights are.

Packing is spelled out with shifts, number by number as the formats' descriptions have it, and shares no code with what reads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Writer = Callable[[Tensor, str], tuple[Tensors, Tensor]]  # weights [N, K] and a module's name to its tensors and what they are
GROUP = 32
QUANTISED = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")  # of linear layers, and of Mixtral's experts
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # that lie in a word from its lowest bits on


@dataclass(frozen=True)
class Format:
    """A format: what the config says, how a matrix is written, and what of its weights is kept on a GPU."""

    config: dict[str, Any]
    write: Writer
    said: str
    kept: bool = True


def write_quantised(source: Path, folder: Path, form: Format) -> Tensors:
    """A copy of a checkpoint with the linear layers of its layers, and its experts, in a format; returns all weights as they are
    then."""
    shutil.copytree(source, folder)
    tensors, dense = dict(load_file(folder / "model.safetensors")), {}
    for name, weight in list(tensors.items()):
        dense[name] = weight
        if name.endswith(QUANTISED):
            module = name.removesuffix(".weight")
            del tensors[name]
            parts, dense[name] = form.write(weight, module)
            tensors |= {f"{module}.{ending}": part.contiguous() for ending, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": form.config}))
    return dense


def words(codes: Tensor, bits: int) -> Tensor:
    """int32 [R, ceil(C bits / 32)]: numbers of each row one after the other, lowest bits first."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (place * bits) for place, code in enumerate(row))
        rows.append([(whole >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def rounded(weight: Tensor, bits: int, group: int, *, groups: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], float16 scales and zeros [N, G], and what they stand for; column k is in group groups[k]."""
    n, k = weight.shape
    groups = torch.arange(k) // group if groups is None else groups
    scales, zeros = torch.empty(n, -(-k // group)), torch.empty(n, -(-k // group))
    for number in range(scales.shape[1]):
        part = weight[:, groups == number]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, number] = ((high - low) / (2**bits - 1)).half().float()
        zeros[:, number] = (-low / scales[:, number]).round().clamp(0, 2**bits - 1)
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, 2**bits - 1)
    return codes.long(), scales.half(), zeros.long(), (codes - zeros[:, groups]) * scales[:, groups]


def fine_grained(weight: Tensor, _: str) -> tuple[Tensors, Tensor]:
    n, k = weight.shape
    high, wide = -(-n // 32), -(-k // 32)
    scales, dense, codes = torch.empty(high, wide), torch.empty(n, k), torch.empty(n, k, dtype=torch.float8_e4m3fn)
    for i in range(high):
        for j in range(wide):
            block = (slice(32 * i, 32 * i + 32), slice(32 * j, 32 * j + 32))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            dense[block] = codes[block].float() * scales[i, j]
    return {"weight": codes, "weight_scale_inv": scales}, dense


def per_tensor(weight: Tensor, _: str) -> tuple[Tensors, Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale


def per_row(weight: Tensor, _: str) -> tuple[Tensors, Tensor]:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def eight_bits(weight: Tensor, _: str) -> tuple[Tensors, Tensor]:
    codes, scales, zeros, dense = rounded(weight, 8, weight.shape[1])
    parts = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales, "weight_zero_point": (zeros - 128).to(torch.int8)}
    return parts, dense


def packed_rows(weight: Tensor, _: str, *, bits: int = 4, zeros: bool = True, order: bool = False) -> tuple[Tensors, Tensor]:
    n, k = weight.shape
    groups = torch.arange(k) // GROUP
    groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(3))] if order else groups
    codes, scales, points, dense = rounded(weight, bits, GROUP, groups=groups)
    if not zeros:
        points = torch.full_like(points, 2 ** (bits - 1))
        dense = (codes - points[:, groups]) * scales[:, groups].float()
    parts = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
    if zeros:
        parts["weight_zero_point"] = words(points.t(), bits).t()
    if order:
        parts["weight_g_idx"] = groups.int()
    return parts, dense


def gptq(
    weight: Tensor, _: str, *, bits: int = 4, group: int = GROUP, order: bool = False, version: int = 1
) -> tuple[Tensors, Tensor]:
    """Version 1 takes one from all zeros of a word at once, as from one number: a zero of 0 borrows from the next."""
    k = weight.shape[1]
    groups = torch.arange(k) // group
    groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(3))] if order else groups
    codes, scales, zeros, dense = rounded(weight, bits, group, groups=groups)
    ones = int("1".rjust(bits, "0") * (32 // bits), 2) if version == 1 else 0
    parts = {"qweight": words(codes, bits).t(), "qzeros": words(zeros.t(), bits) - ones, "scales": scales.t()}
    parts["g_idx"] = groups.int()
    return parts | {"bias": torch.zeros(len(weight))}, dense  # as AutoGPTQ gives every layer


def awq(weight: Tensor, _: str, *, group: int = GROUP) -> tuple[Tensors, Tensor]:
    codes, scales, zeros, dense = rounded(weight, 4, group)

    def interleaved(table: Tensor) -> Tensor:  # [R, N] to words [R, N / 8]
        return words(table.view(len(table), -1, 8)[:, :, list(AWQ_COLUMNS)].flatten(1), 4)

    return {"qweight": interleaved(codes.t()), "qzeros": interleaved(zeros.t()), "scales": scales.t()}, dense


def bitsandbytes_8(weight: Tensor, _: str) -> tuple[Tensors, Tensor]:
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round()
    parts = {"weight": codes.to(torch.int8), "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes * (largest[:, None] / 127)


def bitsandbytes_4(weight: Tensor, _: str, *, nested: bool = True, storage: torch.dtype = torch.uint8) -> tuple[Tensors, Tensor]:
    table, flat = torch.linspace(-1, 1, 16) ** 3, weight.flatten()
    blocks = flat.view(-1, 64)
    largest = blocks.abs().amax(1)
    codes = (blocks[:, :, None] / largest[:, None, None] - table).abs().argmin(2).flatten()
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
    parts = {"weight": packed.view(storage)[:, None], "weight.quant_map": table}
    if nested:
        map_, offset = torch.linspace(-1, 1, 256), float(largest.mean())
        coarse = torch.stack([(part - offset).abs().max() for part in largest.split(256)])
        spread = coarse.repeat_interleave(256)[: len(largest)]
        small = (((largest - offset) / spread)[:, None] - map_).abs().argmin(1)
        largest = map_[small] * spread + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"weight.absmax": small.to(torch.uint8), "weight.nested_absmax": coarse, "weight.nested_quant_map": map_}
    else:
        parts["weight.absmax"] = largest
    said = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(said), dtype=torch.uint8)
    return parts, (table[codes].view(-1, 64) * largest[:, None]).view(weight.shape)


def compressed(format_: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True} | weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def _with(write: Callable[..., tuple[Tensors, Tensor]], **options: Any) -> Writer:
    return lambda weight, name: write(weight, name, **options)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
FORMATS: dict[str, Format] = {
    "fp8-blocks": Format({"quant_method": "fp8", "weight_block_size": [32, 32]}, fine_grained, "FP8 in blocks of 32 x 32"),
    "modelopt": Format({"quant_method": "modelopt", "quant_algo": "FP8"}, per_tensor, "FP8"),
    "fbgemm": Format({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, per_row, "FP8"),
    "ct-fp8": Format(compressed("float-quantized", num_bits=8, type="float", strategy="channel"), per_row, "FP8"),
    "ct-int8": Format(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False), eight_bits, "8 bits"
    ),
    "ct-int4": Format(compressed("pack-quantized", **INT4), _with(packed_rows, zeros=False), "4 bits in groups of 32"),
    "ct-zeros": Format(compressed("pack-quantized", **INT4, symmetric=False), packed_rows, "4 bits in groups of 32"),
    "ct-order": Format(compressed("pack-quantized", **INT4, actorder="group"), _with(packed_rows, order=True), "4 bits"),
    "ct-int3": Format(compressed("pack-quantized", **INT4 | {"num_bits": 3}), _with(packed_rows, bits=3), "3 bits"),
    "gptq": Format(GPTQ, gptq, "GPTQ, 4 bits in groups of 32"),
    "gptq-order": Format(GPTQ | {"desc_act": True}, _with(gptq, order=True), "GPTQ"),
    "gptq-8": Format(GPTQ | {"bits": 8}, _with(gptq, bits=8), "GPTQ, 8 bits"),
    "gptq-2": Format(GPTQ | {"bits": 2}, _with(gptq, bits=2), "GPTQ, 2 bits"),
    "gptq-v2": Format(GPTQ | {"checkpoint_format": "gptq_v2"}, _with(gptq, version=2), "GPTQ"),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq, "AWQ"),
    "bnb-8": Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_8, "bitsandbytes, 8 bits"),
    "bnb-4": Format(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        _with(bitsandbytes_4, nested=False),
        "bitsandbytes, 4 bits (nf4)",
        kept=False,
    ),
    "bnb-storage": Format(
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_quant_storage": "bfloat16",
        },
        _with(bitsandbytes_4, storage=torch.bfloat16),
        "bitsandbytes, 4 bits (nf4)",
        kept=False,
    ),
    "bnb-nested": Format(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        bitsandbytes_4,
        "bitsandbytes, 4 bits (nf4)",
        kept=False,
    ),
}
