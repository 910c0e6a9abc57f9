"""Checkpoints that transformers wrote with torchao: tensors of classes of its own, taken apart, which it puts together again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from specontext.errors import ModelError
from specontext.installing import install_command


def torchao_tensors(parts: Mapping[str, Tensor], metadata: Mapping[str, str], where: object) -> dict[str, Tensor]:
    """The tensors of a file, written out.

    Args:
        parts: all tensors of the file.
        metadata: what it says of them.
        where: the checkpoint, for messages.

    Raises:
        ModelError: torchao is not installed, or does not take these tensors.
    """
    put_together = _put_together(where)
    if "tensor_names" not in metadata:
        raise ModelError(f"{where} was not written by torchao: its files do not say what their tensors belong to")
    found, left = put_together(dict(parts), dict(metadata))
    if left:
        raise ModelError(f"torchao finds no place for {sorted(left)[0]} of {where}")
    dense: dict[str, Any] = {name: one.dequantize() if type(one) is not Tensor else one for name, one in found.items()}
    return dense


def _put_together(where: object) -> Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]:
    if find_spec("torchao") is None:
        raise ModelError(f"the weights of {where} are torchao's, which is not installed: {install_command('torchao')}")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # extensions that it cannot load are of no use here
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    found: Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]] = unflatten_tensor_state_dict
    return found
