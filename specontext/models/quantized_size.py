"""How many bytes quantised weights take on a GPU, from headers of files where they are there and from shapes where not."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from specontext.checkpoints.weights import SHARDED, SINGLE
from specontext.models.attention import register_attention
from specontext.models.quantized import linear_layers, skeleton_of
from specontext.models.weights import decoder_headers
from specontext.quantization.made import FORMS, Form
from specontext.quantization.schemes import Scheme
from specontext.quantization.stored import stored_bytes, stored_matrices


def quantised_bytes(
    source: Path | str,
    config: PreTrainedConfig,
    parameters: int,
    itemsize: int,
    scheme: Scheme | None,
    kind: str | None,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Bytes of a decoder's weights, as `load_quantised` has them where kernels run.

    Args:
        source: as `resolve_model_path` gives it; sizes of a directory with weights are those of its tensors.
        parameters: of the decoder, all of them.
        itemsize: bytes of a number in the format that the model runs in.
        scheme, kind: what the checkpoint says of its quantisation, or what plain weights are rounded to.
        trust_remote_code: let code that comes with the config make the decoder.

    Raises:
        ModelError: broken files, or tensors that do not fit the scheme.
    """
    register_attention()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    skeleton = skeleton_of(config, {"trust_remote_code": trust_remote_code})
    shapes = {name: (module.out_features, module.in_features) for name, module in linear_layers(skeleton).items()}
    form = scheme.form if scheme is not None else FORMS[kind] if kind is not None else None
    if form is None:  # written out when it is loaded
        return parameters * itemsize
    if scheme is not None and isinstance(source, Path) and any((source / name).is_file() for name in (*SINGLE, *SHARDED)):
        headers = decoder_headers(source, config)
        parts = stored_matrices(headers, scheme, source).matrices
        sizes = {name: stored_bytes(parts[name], headers, _itemsize) for name in parts.keys() & shapes.keys()}
    else:
        sizes = {name: form.nbytes(*shape) for name, shape in shapes.items() if scheme is None or scheme.quantizes(name)}
    kept = {name: size for name, size in sizes.items() if _is_kept(form, shapes[name][1])}
    plain = parameters - sum(shapes[name][0] * shapes[name][1] for name in kept)
    return plain * itemsize + sum(kept.values())


def _is_kept(form: Form, k: int) -> bool:
    """Whether kernels take matrices with k columns; see `QuantizedMatrix.group`."""
    return k % 32 == 0 and form.columns % 32 == 0


def _itemsize(name: str) -> int:
    found: torch.dtype = getattr(torch, name)
    return found.itemsize
