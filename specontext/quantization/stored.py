"""The tensors of a quantised checkpoint: which belong to one matrix, and what that matrix is.

Formats are told apart by the names and number formats of the tensors of a module:

    fp8                  weight (float8_e4m3fn), weight_scale or weight_scale_inv
    compressed-tensors   the same; weight (int8), weight_scale; weight_packed, weight_scale, weight_shape; zeros, g_idx
    GPTQ                 qweight [K / 8, N], qzeros [G, N / 8], scales [G, N], g_idx [K]
    AWQ                  qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]
    bitsandbytes         weight (int8), SCB; weight (bytes), weight.absmax, weight.quant_map, weight.quant_state...

Scales of activations (`input_scale` and the like) are left out knowingly: activations are not rounded here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.checkpoints.weights import StoredTensor
from specontext.checkpoints.wording import first_few
from specontext.errors import ModelError
from specontext.kernels.quantized_linear import FP8, INT4, INT8, QuantizedMatrix, packed
from specontext.quantization.bitsandbytes import QUANT_STATE, four_bit_matrix
from specontext.quantization.packing import unpacked, unpacked_awq
from specontext.quantization.schemes import Scheme, gptq_layout

OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "input_zero_point", "input_global_scale")
OF_KV = re.compile(r"(^|\.)([kvq]_scale|kv_scale|[kvq]_zero_point|[kv]_cache_scale|(k|v)_proj\.output_scale)$")
# Endings of the tensors of a matrix; after `weight.` those of bitsandbytes.
ENDINGS = (
    "weight",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_packed",
    "weight_shape",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "SCB",
    "weight_format",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
)
CODES = ("weight_packed", "qweight")  # that are codes whatever else is there
SMALL = ("float8_e4m3fn", "int8", "uint8")

Parts = Mapping[str, str]  # names of a module's tensors, by their endings
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Stored:
    """The tensors of a quantised checkpoint.

    Attributes:
        matrices: the tensors of each quantised module, by its name.
        plain: names of all others that a decoder takes, or should.
        left_out: names of those that only say how activations are rounded.
    """

    matrices: Mapping[str, Parts]
    plain: list[str]
    left_out: list[str]


def stored_matrices(tensors: Mapping[str, StoredTensor], scheme: Scheme, source: object) -> Stored:
    """Sort a checkpoint's tensors.

    Raises:
        ModelError: scales of an 8-bit KV cache, codes without scales, or no quantised tensor at all.
    """
    if of_kv := sorted(name for name in tensors if OF_KV.search(name)):
        raise ModelError(
            f"{source} has fixed scales of an 8-bit KV cache ({first_few(of_kv)}), which are not used here: KV is stored in the "
            "model's number format, or with scales of its own; take the checkpoint without them"
        )
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        module, ending = _split(name)
        if ending is not None:
            modules[module][ending] = name
    matrices = {module: parts for module, parts in modules.items() if _is_quantised(parts, tensors)}
    taken = {name for parts in matrices.values() for name in parts.values()}
    left_out = [name for name in tensors if name.rpartition(".")[2] in OF_ACTIVATIONS and name not in taken]
    plain = [name for name in tensors if name not in taken and name not in left_out]
    if not matrices:
        raise ModelError(
            f"{source} says that its weights are quantised ({scheme.words}), and none of its tensors is: take the config.json "
            "that belongs to these weights"
        )
    return Stored(matrices, plain, left_out)


def _split(name: str) -> tuple[str, str | None]:
    """Module and ending of a tensor's name; no ending for what belongs to no matrix."""
    for ending in ENDINGS:
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), ending
    module, found, _ = name.partition(f".{QUANT_STATE}")
    return (module, QUANT_STATE) if found else (name, None)


def _is_quantised(parts: Parts, tensors: Mapping[str, StoredTensor]) -> bool:
    return any(ending in parts for ending in (*CODES, QUANT_STATE)) or (
        "weight" in parts and tensors[parts["weight"]].dtype in SMALL
    )


def stored_bytes(parts: Parts, tensors: Mapping[str, StoredTensor], itemsize: Callable[[str], int]) -> int:
    """Bytes of a matrix as it is kept: codes and scales as they are stored, a byte for each zero, no other table."""
    total = 0
    for ending, name in parts.items():
        stored = tensors[name]
        numbers = 1
        for size in stored.shape:
            numbers *= size
        if ending in ("qzeros", "weight_zero_point"):
            total += _numbers_of(tensors[parts["scales" if "scales" in parts else "weight_scale"]].shape)
        elif ending not in ("weight_shape", "g_idx", "weight_g_idx", "weight_format"):
            total += numbers * itemsize(stored.dtype)
    return total


def _numbers_of(shape: Iterable[int]) -> int:
    numbers = 1
    for size in shape:
        numbers *= size
    return numbers


def read_matrix(module: str, parts: Parts, scheme: Scheme, read: Read) -> QuantizedMatrix | Tensor:
    """A module's matrix [N, K]; written out, in float32, where its codes are places in a table.

    Raises:
        ModelError: tensors that are missing, too many, or of shapes that do not fit together; the message names the module.
    """
    try:
        if scheme.method == "bitsandbytes":
            return _bitsandbytes(parts, read)
        if "weight_packed" in parts:
            return _pack_quantized(parts, scheme, read)
        if "qweight" in parts:
            return _awq(parts, scheme, read) if scheme.method == "awq" else _gptq(parts, scheme, read)
        return _scaled(parts, scheme, read)
    except KeyError as error:
        raise ModelError(f"the quantised weights of {module} are incomplete: {error.args[0]} is not there") from error
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError, ArithmeticError, StopIteration) as error:
        shapes = ", ".join(f"{ending} {list(read(name).shape)}" for ending, name in parts.items())
        raise ModelError(f"the quantised weights of {module} do not fit together ({shapes}): download them again") from error


def _expect(parts: Parts, *endings: str) -> None:
    """Nothing is left out silently."""
    if extra := sorted(set(parts) - set(endings)):
        raise ModelError(f"the quantised weights have {parts[extra[0]]}, which is not read")


def _scaled(parts: Parts, scheme: Scheme, read: Read) -> QuantizedMatrix:
    """Numbers of 8 bits with scales: one, or for rows, groups or blocks."""
    _expect(parts, "weight", "weight_scale", "weight_scale_inv", "weight_zero_point")
    weight = read(parts["weight"])
    name = parts.get("weight_scale_inv") or parts["weight_scale"]
    scales = _as_float(read(name))
    zeros = read(parts["weight_zero_point"]) if "weight_zero_point" in parts else None
    n, k = weight.shape
    scales, rows, columns = _table(scales, n, k, scheme)
    if weight.dtype == torch.float8_e4m3fn:
        if zeros is not None and bool(zeros.float().any()):
            raise ModelError(f"{parts['weight_zero_point']} has zeros of FP8 weights, which are not read")
        return QuantizedMatrix(FP8, weight.view(torch.uint8), scales, rows, columns)
    if weight.dtype != torch.int8:
        raise ModelError(f"{parts['weight']} holds numbers of type {weight.dtype}, which are not read with scales")
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    if zeros is not None:
        zeros = (zeros.reshape(scales.shape).to(torch.int16) + 128).to(torch.uint8)
    return QuantizedMatrix(INT8, codes, scales, rows, columns, zeros, 128)


def _as_float(scales: Tensor) -> Tensor:
    """Powers of two are stored as their exponents alone by some (float8_e8m0fnu)."""
    return scales if scales.dtype in (torch.float32, torch.float16, torch.bfloat16) else scales.to(torch.float32)


def _table(scales: Tensor, n: int, k: int, scheme: Scheme) -> tuple[Tensor, int, int]:
    """Scales as a table, and the rows and columns of W that each stands for."""
    if scales.numel() == 1:
        return scales.reshape(1, 1), n, k
    table = scales.reshape(n, 1) if scales.ndim == 1 else scales
    high, wide = table.shape
    form = scheme.form
    rows, columns = _block(n, high, form.rows if form else 0), _block(k, wide, form.columns if form else 0)
    return table.contiguous(), rows, columns


def _block(size: int, parts: int, said: int) -> int:
    """Rows or columns of a block: what the config says where that fits, else what divides them evenly."""
    if said and -(-size // said) == parts:
        return said
    assert size % parts == 0
    return size // parts


def _pack_quantized(parts: Parts, scheme: Scheme, read: Read) -> QuantizedMatrix:
    """compressed-tensors: numbers in int32 words along the rows of W."""
    _expect(parts, "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    words, scales = read(parts["weight_packed"]), _as_float(read(parts["weight_scale"]))
    n, k = (int(size) for size in read(parts["weight_shape"]))
    [bits] = [bits for bits in scheme.bits if -(-k * bits // 32) == words.shape[1]]
    codes, offset = unpacked(words, bits, k, dim=1), 1 << (bits - 1)
    scales, rows, columns = _table(scales, n, k, scheme)
    zeros = read(parts["weight_zero_point"]) if "weight_zero_point" in parts else None
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = unpacked(zeros, bits, n, dim=0)
    elif zeros is not None:  # that of a whole matrix is stored as it is
        zeros = (zeros.to(torch.int16) + offset).to(torch.uint8)
    order = _order(read(parts["weight_g_idx"]), columns) if "weight_g_idx" in parts else None
    zeros = None if zeros is None else zeros.reshape(scales.shape)
    return _integer_matrix(codes, bits, scales, rows, columns, zeros, offset, order)


def _gptq(parts: Parts, scheme: Scheme, read: Read) -> QuantizedMatrix:
    """Words along the columns of W, of which the last one may not be full; zeros are stored less one, except in version 2.

    One is taken from all of a word's zeros at once, so a zero of 0 borrows from the next, and gets it back the same way.
    """
    _expect(parts, "qweight", "qzeros", "scales", "g_idx")
    bits = int(scheme.settings["bits"])
    words, scales, zeros = read(parts["qweight"]), read(parts["scales"]), read(parts["qzeros"])
    groups = read(parts["g_idx"]) if "g_idx" in parts else None
    n, k = words.shape[1], words.shape[0] * 32 // bits if groups is None else len(groups)
    codes = unpacked(words, bits, k, dim=0).t()
    if gptq_layout(scheme.settings) != "gptq_v2":
        zeros = zeros + sum(1 << place for place in range(0, 32, bits))
    zeros = unpacked(zeros, bits, n, dim=1).t()
    columns = _block(k, scales.shape[0], scheme.form.columns if scheme.form else 0)
    order = None if groups is None else _order(groups, columns)
    return _integer_matrix(codes, bits, scales.t(), 1, columns, zeros, 0, order)


def _awq(parts: Parts, scheme: Scheme, read: Read) -> QuantizedMatrix:
    """Words along the rows of W's transpose."""
    _expect(parts, "qweight", "qzeros", "scales")
    codes, scales = unpacked_awq(read(parts["qweight"])).t(), read(parts["scales"]).t()
    zeros = unpacked_awq(read(parts["qzeros"])).t()
    columns = _block(codes.shape[1], scales.shape[1], scheme.form.columns if scheme.form else 0)
    return _integer_matrix(codes, 4, scales, 1, columns, zeros, 0, None)


def _bitsandbytes(parts: Parts, read: Read) -> QuantizedMatrix | Tensor:
    if "SCB" not in parts:
        return four_bit_matrix(parts, read)
    _expect(parts, "weight", "SCB", "weight_format")
    if "weight_format" in parts and int(read(parts["weight_format"])) != 0:
        raise ModelError(f"{parts['weight_format']} is not 0: only weights row by row are read")
    weight = read(parts["weight"])
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    return QuantizedMatrix(INT8, codes, read(parts["SCB"]).float()[:, None] / 127, 1, weight.shape[1], None, 128)


def _order(groups: Tensor, columns: int) -> Tensor | None:
    """Columns of W by the groups that they belong to; None where they stand so already.

    Columns of a group keep their order. A group with another number of columns than all others cannot be.
    """
    usual = torch.arange(len(groups), device=groups.device) // columns
    if torch.equal(groups.to(usual.dtype), usual) or not bool((groups >= 0).all()):
        return None
    order = torch.argsort(groups, stable=True)
    assert torch.equal(groups[order].to(usual.dtype), usual)
    return order


def _integer_matrix(
    codes: Tensor, bits: int, scales: Tensor, rows: int, columns: int, zeros: Tensor | None, offset: int, order: Tensor | None
) -> QuantizedMatrix:
    """A matrix of unsigned integers [N, K], its columns sorted by their groups."""
    if order is not None:
        codes = codes[:, order]
    kind = INT4 if bits <= 4 and codes.shape[1] % 2 == 0 else INT8
    codes = codes.contiguous()
    codes = packed(codes, columns) if kind == INT4 else codes
    if zeros is not None and bool((zeros == offset).all()):
        zeros = None
    return QuantizedMatrix(
        kind, codes, scales.contiguous(), rows, columns, None if zeros is None else zeros.contiguous(), offset, order
    )
