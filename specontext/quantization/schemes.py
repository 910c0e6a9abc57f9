"""What a checkpoint says of its quantisation: which methods are known, and in which form their matrices are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from specontext.checkpoints.quantization import ADVICE, Entry
from specontext.checkpoints.wording import in_one_sentence
from specontext.errors import ModelError
from specontext.kernels.quantized_linear import FP8, INT4, INT8
from specontext.quantization.made import Form

KNOWN = "FP8 (fine-grained, compressed-tensors, ModelOpt, FBGEMM), compressed-tensors, GPTQ, AWQ, bitsandbytes and torchao"
LEAVES_OUT = "-:"  # before the patterns of `dynamic` whose modules are not quantised
SKIPPED = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers", "llm_int8_skip_modules")


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's weights are quantised.

    Attributes:
        method: 'fp8', 'gptq', 'awq', 'compressed-tensors', 'bitsandbytes' or 'torchao'; its tensors are told apart by it.
        words: what it is, for people.
        form: of its matrices where they can stay as they are; None for codes that only a table explains.
        skipped: modules that are not quantised: names, their parts, or patterns after 're:'.
        settings: what the config says.
    """

    method: str
    words: str
    form: Form | None
    skipped: tuple[str, ...]
    settings: Mapping[str, Any]

    def quantizes(self, name: str) -> bool:
        """Whether a linear layer of this name is quantised."""
        return not any(_names(pattern, name) for pattern in self.skipped)

    @property
    def orders_columns(self) -> bool:
        """Whether matrices have their columns in an order of their own, by which they were rounded."""
        ordered = [weights.get("actorder") for weights in _weights_of(self.settings)]
        return bool(self.settings.get("desc_act")) or any(one in ("group", "dynamic", True) for one in ordered)

    @property
    def bits(self) -> tuple[int, ...]:
        """How many bits a number of compressed-tensors may have: what its config says of all or of some modules."""
        return tuple(sorted({_bits_of(weights) for weights in _weights_of(self.settings)}))


def _weights_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each of compressed-tensors' groups of modules says of its weights."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    return [group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)]


def _bits_of(weights: Mapping[str, Any]) -> int:
    return int(weights.get("num_bits") or 8)


def _names(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    pattern = pattern.rstrip("*").rstrip(".")
    return name == pattern or name.startswith(f"{pattern}.") or name.endswith(f".{pattern}") or f".{pattern}." in name


def scheme_of(entry: Entry, source: object) -> Scheme:
    """The scheme that a checkpoint's entry describes.

    Args:
        source: the checkpoint, for messages.

    Raises:
        ModelError: a method, or a setting of one, that is not read; the message says which.
    """

    def refuse(why: str) -> ModelError:
        return ModelError(f"quantised weights are not supported: {entry.described} of {source}{why}; {ADVICE}")

    method = _method(entry)
    reader = READERS.get(method)
    if reader is None:
        raise refuse(f" (those in {KNOWN} are)")
    if problem := _unread(entry.values):
        raise refuse(f", because {problem}")
    try:
        found = reader(entry.values)
        if isinstance(found, str):
            raise refuse(f", because {found}")
        words, form = found
        skipped = tuple(str(name) for key in SKIPPED for name in entry.values.get(key) or ())
        skipped += tuple(f"re:{str(pattern).removeprefix(LEAVES_OUT)}" for pattern in entry.values.get("dynamic") or {})
        if not entry.values.get("lm_head"):
            skipped += ("lm_head",)
        for pattern in skipped:
            _names(pattern, "")
    except (TypeError, ValueError, AttributeError, LookupError, re.error) as error:  # of another kind than they should be
        raise refuse(f", because its settings are broken ({in_one_sentence(error)})") from error
    return Scheme(TENSORS.get(method, method), words, form, skipped, entry.values)


def _method(entry: Entry) -> str:
    """The method's name; files beside a config and older configs do not say it, but have settings of their own."""
    values = entry.values
    said = values.get("quant_method")
    if said is not None:
        return str(said)
    if str(values.get("quant_algo", "")).startswith("FP8"):
        return "modelopt"
    if "w_bit" in values:
        return "awq"
    if {"bits", "group_size", "desc_act"} <= values.keys():
        return "gptq"
    if "config_groups" in values:
        return "compressed-tensors"
    return "nothing that is known"


def _unread(values: Mapping[str, Any]) -> str | None:
    """A setting of any method that changes what is computed, and that is not read here."""
    for key in ("transform_config", "extra_config", "rotation"):
        if values.get(key):
            return f"its {key} is not read"
    if other := [pattern for pattern in values.get("dynamic") or {} if not str(pattern).startswith(LEAVES_OUT)]:
        return f"its dynamic, which gives {other[0]} settings of their own, is not read"
    sparsity = values.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and str(sparsity.get("format", "dense")) != "dense":
        return f"its weights are sparse ({sparsity['format']})"
    return None


Found = tuple[str, Form | None] | str  # words and form, or why it is not read


def _fine_grained(values: Mapping[str, Any]) -> Found:
    if values.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        return f"its numbers are {values['fmt']}, not e4m3"
    block = values.get("weight_block_size")
    if block is None:
        return "FP8", Form(FP8, 0, 0, scale_bytes=4)
    return f"FP8 in blocks of {block[0]} x {block[1]}", Form(FP8, int(block[0]), int(block[1]), scale_bytes=4)


def _row_wise(_: Mapping[str, Any]) -> Found:
    return "FP8", Form(FP8, 1, 0, scale_bytes=4)


def _modelopt(values: Mapping[str, Any]) -> Found:
    algorithm = str(values.get("quant_algo"))
    return ("FP8", Form(FP8, 0, 0, scale_bytes=4)) if algorithm == "FP8" else f"{algorithm} is not read"


def _group_of(values: Mapping[str, Any]) -> int:
    size = next((values[key] for key in ("group_size", "q_group_size") if values.get(key) is not None), -1)
    return max(0, int(size))


def gptq_layout(settings: Mapping[str, Any]) -> str:
    """How GPTQ's tensors lie: 'gptq', unless the settings say something else; newer ones say it twice."""
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq")


def _gptq(values: Mapping[str, Any]) -> Found:
    bits, group = int(values.get("bits", 0)), _group_of(values)
    layout = gptq_layout(values)
    if bits not in (2, 4, 8):
        return f"{bits} bits are not read, only 2, 4 and 8"
    if layout not in ("gptq", "gptq_v2"):
        return f"its checkpoint_format {layout} is not read, only gptq and gptq_v2"
    if str(values.get("pack_dtype", "int32")) != "int32":
        return f"its pack_dtype {values['pack_dtype']} is not read, only int32"
    return f"GPTQ, {_words(bits, group)}", Form(INT8 if bits == 8 else INT4, 1, group, zeros=True)


def _awq(values: Mapping[str, Any]) -> Found:
    bits, group = int(values.get("bits") or values.get("w_bit") or 0), _group_of(values)
    layout = str(values.get("version") or values.get("format") or values.get("checkpoint_format") or "gemm").lower()
    if bits != 4:
        return f"{bits} bits are not read, only 4"
    if layout != "gemm":
        return f"its layout {layout} is not read, only gemm"
    return f"AWQ, {_words(bits, group)}", Form(INT4, 1, group, zeros=True)


def _auto_round(values: Mapping[str, Any]) -> Found:
    packing = str(values.get("packing_format", "")).removeprefix("auto_round:")
    if packing in ("auto_gptq", "gptq"):
        return _gptq(values)
    return f"its packing_format {packing or '(none)'} is not read, only auto_gptq"


def _compressed(values: Mapping[str, Any]) -> Found:
    groups = [group for group in (values.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    weights = _weights_of(values)
    formats = {str(found) for found in (values.get("format"), *(group.get("format") for group in groups)) if found}
    unread = sorted(formats - set(COMPRESSED_FORMATS))
    if unread:
        return f"its format {unread[0]} is not read, only {', '.join(COMPRESSED_FORMATS)}"
    if not weights:
        return "its config_groups say nothing of weights"
    kinds = {_compressed_kind(one) for one in weights}
    if bad := sorted(kind for kind in kinds if isinstance(kind, str)):
        return bad[0]
    found = kinds.pop()
    assert not isinstance(found, str)
    return found if not kinds else ("several kinds of compressed-tensors", found[1])


COMPRESSED_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision", "dense")


def _compressed_kind(weights: Mapping[str, Any]) -> tuple[str, Form] | str:
    bits, strategy = _bits_of(weights), str(weights.get("strategy") or "tensor")
    zeros = not weights.get("symmetric", True)
    if strategy not in ("tensor", "channel", "group", "block"):
        return f"its strategy {strategy} is not read"
    rows, columns = 1, 0
    if strategy == "tensor":
        rows = 0
    elif strategy == "group":
        columns = int(weights.get("group_size") or 0)
    elif strategy == "block":
        rows, columns = (int(size) for size in weights.get("block_structure") or (128, 128))
    if weights.get("type") == "float":
        return ("FP8", Form(FP8, rows, columns)) if bits == 8 else f"floating-point numbers of {bits} bits are not read"
    if not 1 <= bits <= 8:
        return f"{bits} bits are not read"
    return f"compressed-tensors, {_words(bits, columns)}", Form(INT4 if bits <= 4 else INT8, rows, columns, zeros)


def _bitsandbytes(values: Mapping[str, Any]) -> Found:
    if values.get("load_in_8bit") or values.get("_load_in_8bit"):
        return "bitsandbytes, 8 bits", Form(INT8, 1, 0, scale_bytes=4)
    return f"bitsandbytes, 4 bits ({values.get('bnb_4bit_quant_type', 'fp4')})", None


def _torchao(values: Mapping[str, Any]) -> Found:
    kind = values.get("quant_type")
    if isinstance(kind, Mapping):  # {"default": {"_type": ...}}
        kind = next((one.get("_type") for one in kind.values() if isinstance(one, Mapping)), None)
    return f"torchao, {kind or 'a kind that is not named'}", None


def _words(bits: int, group: int) -> str:
    return f"{bits} bits in groups of {group}" if group else f"{bits} bits"


READERS: dict[str, Callable[[Mapping[str, Any]], Found]] = {
    "fp8": _fine_grained,
    "fbgemm_fp8": _row_wise,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}
TENSORS = {"fbgemm_fp8": "fp8", "modelopt": "fp8", "auto-round": "gptq"}  # whose tensors a method's are like
