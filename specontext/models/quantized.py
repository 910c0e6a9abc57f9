"""Decoders with quantised weights: those of a checkpoint, 16-bit ones that are rounded while they are loaded, or random ones.

Where Triton kernels run, the linear layers and the experts of the decoder's layers keep their codes (`QuantizedLinear`,
`QuantizedExperts`). Everywhere else, and in embeddings, output layers and where codes are places in a table, the matrix is
written out in the number format that the model runs in. transformers builds the decoder of both kinds from one state dict, in
which a matrix that is kept has a stand-in of its shape without memory: so names and shapes of all tensors are checked as those
of any other checkpoint. A rank has its own part of the codes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specontext.checkpoints.adapters import Adapter
from specontext.errors import ModelError
from specontext.kernels.dispatch import use_triton
from specontext.kernels.quantized_linear import QuantizedMatrix, dequantized
from specontext.locations import folder_of, one_sentence
from specontext.model_shape import ModelShape
from specontext.models.adapters import merged
from specontext.models.attention import ATTENTION_NAME
from specontext.models.decoder import decoder_layers
from specontext.models.experts import experts_of, keep_codes, stand_in
from specontext.models.language_model import made_model
from specontext.models.quantized_experts import read_tables, round_tables
from specontext.models.ranks import Ranks
from specontext.models.reports import check_report, no_report
from specontext.models.sharding import OfCodes, parts_of_codes, shard
from specontext.models.weight_sources import Source, random_source, rounded_source, stored_source
from specontext.models.weights import check_numbers, decoder_headers, naming_experts, seeded, tie_as_stored
from specontext.quantization.linear import QuantizedLinear
from specontext.quantization.schemes import Scheme

# Which expert a token goes to is not left to rounding, and attention to latents reads the matrix itself.
WHOLE = ("gate", "wg", "router", "shared_expert_gate", "kv_b_proj")


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
        return made_model(config, options, attn_implementation=ATTENTION_NAME)


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
    parts: Mapping[str, OfCodes],
    where: object,
) -> tuple[PreTrainedModel, dict[str, QuantizedMatrix]]:
    """The decoder with these weights, on the CPU; and the matrices that keep their codes, by the names of linear layers and of
    experts' parameters, whose weights are stand-ins.

    Args:
        keep_on: the device on which codes are kept; None writes all matrices out.
        parts: what a rank has of the codes, by the same names; of matrices that are written out it gets the whole.
        where: the checkpoint, for messages.

    Raises:
        ModelError: tensors that are missing, do not fit or are not taken; the message names them.
    """
    linears = linear_layers(skeleton)
    state = dict(source.plain())
    kept: dict[str, QuantizedMatrix] = {}
    in_tables: set[str] = set()
    for experts in experts_of(skeleton):
        if keep_on is not None and (tables := read_tables(source, experts, parts, keep_on)):
            kept |= tables
            state |= {name: stand_in(experts, table, dtype) for name, table in experts.names().items()}
            in_tables |= {name for names in source.experts[experts.path].values() for name in names}
    for name in source.modules:
        if name in in_tables:
            continue
        matrix = source.matrix(name)
        part = None
        if isinstance(matrix, QuantizedMatrix) and keep_on is not None and name in linears and matrix.group:
            part = parts[name](matrix) if name in parts else matrix
        if part is not None and keep_on is not None:
            kept[name] = part.to(keep_on)
            state[f"{name}.weight"] = torch.zeros((), dtype=dtype).expand(matrix.shape)
        else:
            dense = dequantized(matrix, dtype) if isinstance(matrix, QuantizedMatrix) else matrix.to(dtype)
            state[f"{name}.weight"] = (
                (dense.t() if source.turned and _is_transposed(skeleton, name) else dense).contiguous().cpu()
            )
    _drop_empty_biases(state, source.modules, skeleton)
    with no_report(), one_sentence(f"cannot load the model {where}"), naming_experts(where, source.tensors):
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
    if source.rounded is not None:
        kept |= round_tables(model, source.rounded, keep_on, parts)
    return model, kept


def _keep_codes(model: PreTrainedModel, kept: Mapping[str, QuantizedMatrix]) -> None:
    """Put matrices that keep their codes in the places of linear layers and of experts' tables."""
    tables = set()
    for experts in experts_of(model):
        if own := experts.names().keys() & kept.keys():
            keep_codes(model, experts, kept)
            tables |= own
    for name, matrix in kept.items():
        if name in tables:
            continue
        parent, _, last = name.rpartition(".")
        bias: Any = model.get_submodule(name).bias
        setattr(model.get_submodule(parent), last, QuantizedLinear(matrix, None if bias is None else bias.detach()))


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


def load_quantised(
    asked: Asked,
    config: PreTrainedConfig,
    dtype: str,
    device: torch.device,
    ranks: Ranks | None = None,
    adapter: Adapter | None = None,
) -> tuple[PreTrainedModel, str]:
    """A decoder with quantised weights, or one rank's part of it, and what was done to them, in words.

    Only what keeps its codes is a rank's own part from the beginning: what is written out is in host memory whole first.

    Args:
        config: its own entry for quantisation is taken off it: transformers is to build the decoder without a quantiser.
        adapter: to be merged with the weights.

    Raises:
        ModelError: weights that are broken, incomplete or in a format that is not read; the message names them.
        ConfigError: heads that so many ranks cannot share.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    running = getattr(torch, dtype) if dtype != "auto" else config.dtype
    if running not in (torch.float32, torch.float16, torch.bfloat16):
        running = torch.bfloat16
    path, shape = config.name_or_path, ModelShape.from_config(config, running)
    skeleton = skeleton_of(config, asked.options)
    keep_on = device if asked.keep and keeps_codes(device) else None
    parts = {} if ranks is None else parts_of_codes(skeleton, shape, ranks.share)
    with seeded(device):
        source = _source(asked, config, skeleton, running, keep_on or torch.device("cpu"))
        model, kept = quantised_model(source, config, skeleton, running, keep_on=keep_on, parts=parts, where=asked.source)
    model.config.name_or_path = path
    if adapter is not None:
        model = merged(model, adapter)
    _keep_codes(model, {name: matrix for name, matrix in kept.items() if name not in parts})
    if ranks is not None:
        with one_sentence(f"cannot load the model {asked.source}"):
            shard(model, shape, ranks, device, kept=kept)
    if asked.scheme is None:
        written_out = "" if kept else f", and computed with in {str(running).removeprefix('torch.')}"
        return model, f"rounded to {asked.kind} when they were loaded{written_out}"
    return model, asked.scheme.words if kept else f"dequantised from {asked.scheme.words}"


def _source(
    asked: Asked, config: PreTrainedConfig, skeleton: PreTrainedModel, dtype: torch.dtype, device: torch.device
) -> Source:
    """Where the weights come from; codes are taken apart, or made, on a device."""
    linears, experts = linear_layers(skeleton), experts_of(skeleton)
    kind = asked.kind if asked.scheme is None else None
    if asked.dummy:
        return random_source(asked.scheme, kind, linears, experts, dtype, device)
    folder = folder_of(asked.source, revision=asked.options["revision"], weights=True)
    headers = decoder_headers(folder, config)
    tie_as_stored(config, headers)
    if asked.scheme is not None:
        return stored_source(headers, asked.scheme, asked.source, experts, device)
    assert kind is not None
    check_numbers(headers)
    return rounded_source(headers, kind, linears, device)
