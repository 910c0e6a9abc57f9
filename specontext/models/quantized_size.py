"""How many bytes quantised weights take on a GPU, from headers of files where they are there and from shapes where not."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from specontext.checkpoints.weights import SHARDED, SINGLE
from specontext.models.attention import register_attention
from specontext.models.experts import experts_of, stored_parts
from specontext.models.quantized import linear_layers, skeleton_of
from specontext.models.weight_sources import is_kept, keeps_form
from specontext.models.weights import decoder_headers
from specontext.quantization.made import FORMS
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
    mixtures = {one.path: one for one in experts_of(skeleton) if scheme is None or keeps_form(one, form, scheme)}
    if scheme is not None and isinstance(source, Path) and any((source / name).is_file() for name in (*SINGLE, *SHARDED)):
        headers = decoder_headers(source, config)
        parts = stored_matrices(headers, scheme, source).matrices
        sizes = {name: stored_bytes(parts[name], headers, _itemsize) for name in parts.keys() & shapes.keys()}
        routed = {
            path: sum(stored_bytes(parts[name], headers, _itemsize) for names in tables.values() for name in names)
            for path, tables in stored_parts(parts, mixtures.values()).items()
        }
    else:
        sizes = {name: form.nbytes(*shape) for name, shape in shapes.items() if scheme is None or scheme.quantizes(name)}
        routed = {path: sum(one.count * form.nbytes(*shape) for shape in one.tables.values()) for path, one in mixtures.items()}
    kept = {name: size for name, size in sizes.items() if is_kept(form, shapes[name][1])}
    routed = {path: size for path, size in routed.items() if all(is_kept(form, k) for _, k in mixtures[path].tables.values())}
    plain = parameters - sum(shapes[name][0] * shapes[name][1] for name in kept)
    plain -= sum(mixtures[path].count * n * k for path in routed for n, k in mixtures[path].tables.values())
    return plain * itemsize + sum(kept.values()) + sum(routed.values())


def _itemsize(name: str) -> int:
    found: torch.dtype = getattr(torch, name)
    return found.itemsize
