"""Decoders with quantised weights: those of a checkpoint, 16-bit ones that are rounded while they are loaded, or random ones.

Where Triton kernels run, the linear layers of the decoder's layers keep their codes (`QuantizedLinear`). Everywhere else, and in
embeddings, output layers, experts and where codes are places in a table, the matrix is written out in the number format that the
model runs in. transformers builds the decoder of both kinds from one state dict, in which a matrix that is kept has a stand-in of
its shape without memory: so names and shapes of all tensors are checked as those of any other checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specontext.errors import ModelError
from specontext.kernels.dispatch import use_triton
from specontext.kernels.quantized_linear import QuantizedMatrix, dequantized
from specontext.locations import folder_of, one_sentence
from specontext.models.attention import ATTENTION_NAME
from specontext.models.decoder import decoder_layers
from specontext.models.reports import check_report, no_report
from specontext.models.weight_sources import Source, random_source, rounded_source, stored_source
from specontext.models.weights import check_numbers, weight_headers
from specontext.quantization.linear import QuantizedLinear
from specontext.quantization.schemes import Scheme

# Which expert a token goes to is not left to rounding, and attention to latents reads the matrix itself.
WHOLE = ("gate", "router", "shared_expert_gate", "kv_b_proj")


def keeps_codes(device: torch.device) -> bool:
    """Whether linear layers on a device multiply with codes as they are: there are kernels for it."""
    return use_triton(torch.empty(0, device=device))


def skeleton_of(config: PreTrainedConfig, options: Mapping[str, Any]) -> PreTrainedModel:
    """The decoder without memory.

    Raises:
        ModelError: transformers cannot build it.
    """
    failed = f"cannot build the model of {config.name_or_path or 'this config'}"
    with one_sentence(failed), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION_NAME, trust_remote_code=options["trust_remote_code"]
        )
    return model


def linear_layers(skeleton: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that may keep codes, by their names: those inside of the decoder's layers but for `WHOLE`."""
    names = {id(module): name for name, module in skeleton.named_modules()}
    found = {}
    for layer in decoder_layers(skeleton):
        for module in layer.modules():
            name = names[id(module)]
            if type(module) is nn.Linear and name.rpartition(".")[2] not in WHOLE:
                found[name] = module
    return found


def quantised_model(
    source: Source,
    config: PreTrainedConfig,
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    *,
    keep_on: torch.device | None,
    where: object,
) -> PreTrainedModel:
    """The decoder with these weights, on the CPU but for what keeps its codes.

    Args:
        keep_on: the device on which linear layers keep codes; None writes all matrices out.
        where: the checkpoint, for messages.

    Raises:
        ModelError: tensors that are missing, do not fit or are not taken; the message names them.
    """
    linears = linear_layers(skeleton)
    state, kept = dict(source.plain()), {}
    for name in source.modules:
        matrix = source.matrix(name)
        if isinstance(matrix, QuantizedMatrix) and keep_on is not None and name in linears and matrix.group:
            kept[name] = matrix.to(keep_on)
            state[f"{name}.weight"] = torch.zeros((), dtype=dtype).expand(matrix.shape)
        else:
            dense = dequantized(matrix, dtype) if isinstance(matrix, QuantizedMatrix) else matrix.to(dtype)
            state[f"{name}.weight"] = (
                (dense.t() if source.turned and _is_transposed(skeleton, name) else dense).contiguous().cpu()
            )
    _drop_empty_biases(state, source.modules, skeleton)
    with no_report(), one_sentence(f"cannot load the model {where}"):
        loaded: Any = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
        )
    model, report = loaded
    report = report if source.whole else report | {"missing_keys": set()}
    check_report(where, model, report, source.tensors)
    for name, matrix in kept.items():
        parent, _, last = name.rpartition(".")
        bias = model.get_submodule(name).bias
        setattr(model.get_submodule(parent), last, QuantizedLinear(matrix, None if bias is None else bias.detach()))
    found: PreTrainedModel = model
    return found


def _is_transposed(skeleton: PreTrainedModel, name: str) -> bool:
    """Whether a module has its matrix the other way round than linear layers, as those of GPT-2."""
    try:
        return isinstance(skeleton.get_submodule(name), Conv1D)
    except AttributeError:
        return False


def _drop_empty_biases(state: dict[str, Tensor], modules: tuple[str, ...], skeleton: PreTrainedModel) -> None:
    """Some quantisers give every layer a bias, of zeros where the model has none."""
    own = dict(skeleton.named_parameters())
    for name in (f"{module}.bias" for module in modules):
        if name in state and name not in own and not bool(state[name].any()):
            del state[name]


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Inside, random numbers are the same every time, and nobody else's change."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class Asked:
    """What is to be loaded.

    Attributes:
        source: as `resolve_model_path` gives it.
        scheme: what the checkpoint says of its quantisation; None where its weights are plain.
        kind: 'fp8' or 'int4', to which plain weights are rounded when they are loaded.
        dummy: random weights instead.
        keep: whether codes may be kept, which an adapter that is merged cannot change.
        options: `trust_remote_code` and `revision`.
    """

    source: Path | str
    scheme: Scheme | None
    kind: str | None
    dummy: bool
    keep: bool
    options: Mapping[str, Any]

    def check(self) -> None:
        """Raises ModelError where weights would be rounded twice."""
        if self.scheme is not None and self.kind is not None and self.kind not in self.scheme.words.lower():
            raise ModelError(
                f"the weights of {self.source} are quantised already ({self.scheme.words}): leave out --quantization {self.kind}"
            )

    @property
    def is_quantised(self) -> bool:
        return self.scheme is not None or self.kind is not None


def load_quantised(asked: Asked, config: PreTrainedConfig, dtype: str, device: torch.device) -> tuple[PreTrainedModel, str]:
    """A decoder with quantised weights, and what was done to them, in words.

    Args:
        config: its own entry for quantisation is taken off it: transformers is to build the decoder without a quantiser.

    Raises:
        ModelError: weights that are broken, incomplete or in a format that is not read; the message names them.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    running = getattr(torch, dtype) if dtype != "auto" else config.dtype
    if running not in (torch.float32, torch.float16, torch.bfloat16):
        running = torch.bfloat16
    path = config.name_or_path
    skeleton = skeleton_of(config, asked.options)
    kind = asked.kind if asked.scheme is None else None
    keep_on = device if asked.keep and keeps_codes(device) else None
    work_on = keep_on or torch.device("cpu")
    with seeded(device):
        if asked.dummy:
            source = random_source(asked.scheme, kind, linear_layers(skeleton), running, work_on)
        else:
            folder = folder_of(asked.source, revision=asked.options["revision"], weights=True)
            headers = weight_headers(folder, config)
            if asked.scheme is not None:
                source = stored_source(headers, asked.scheme, asked.source, work_on)
            else:
                assert kind is not None
                check_numbers(headers)
                source = rounded_source(headers, kind, linear_layers(skeleton), work_on)
        model = quantised_model(source, config, skeleton, running, keep_on=keep_on, where=asked.source)
    model.config.name_or_path = path
    kept = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if kind is not None:
        return model, f"rounded to {kind} when they were loaded" + ("" if kept else ", and computed with in " + _name(running))
    assert asked.scheme is not None
    return model, asked.scheme.words if kept else f"dequantised from {asked.scheme.words}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
