"""Whether a model's own code can be captured as a CUDA graph: between calls of attention it must not wait for the device.

Most decoders do not. Mixtures of experts may, by the number format: where products of all experts at once know no kernel, PyTorch
takes one expert after the other, and asks how many tokens each has.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from specontext.kernels.latents import Latents
from specontext.models.attention import listening
from specontext.models.loading import LoadedModel

TOKENS = 2


class _Zeros:
    """Attention that computes nothing, so that what is looked at is the model's alone."""

    positions = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return query.new_zeros((*query.shape[:2], value.shape[2]))

    def attend_window(self, layer: int, window: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.attend(layer, query, key, value)

    def attend_latents(self, layer: int, latents: Latents, query: Tensor, *_: Any, **__: Any) -> Tensor:
        return query.new_zeros((*query.shape[:2], latents.value.shape[1]))


@torch.inference_mode()
def why_not_captured(loaded: LoadedModel) -> str | None:
    """What in a forward pass of a model on a GPU waits for the device, in PyTorch's words; None where nothing does.

    A model whose layers keep states is not looked at: there its code runs otherwise for the first tokens than in a step.
    """
    if loaded.shape.states:
        return None
    model, device = loaded.model, loaded.model.device
    ids, positions = torch.zeros((1, TOKENS), dtype=torch.int64, device=device), torch.arange(TOKENS, device=device)[None]

    def run() -> None:
        with listening(model, _Zeros()):
            model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=positions[0])

    run()  # what is made once may wait
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype, which may miss something
            torch.cuda.set_sync_debug_mode("error")
        run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None
