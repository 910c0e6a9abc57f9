"""One token through a model that has just been loaded: does every layer hand over what the engine counts on?"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specontext.core import ModelShape
from specontext.locations import ModelError
from specontext.models.attention import NoStepError


class _Witness:
    """Stands where a step stands and compares what layers bring with the shape that the config promised."""

    def __init__(self, shape: ModelShape) -> None:
        self.layers: list[int] = []
        self._promised = ((shape.query_heads, shape.head_dim), *[(shape.kv_heads, shape.head_dim)] * 2)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        brought = tuple((int(x.shape[1]), int(x.shape[2])) for x in (query, key, value))
        for name, found, promised in zip(("queries", "keys", "values"), brought, self._promised, strict=True):
            if found != promised:
                has, says = (f"{heads} heads with {dim} dimensions" for heads, dim in (found, promised))
                raise ModelError(f"layer {layer} has {name} of {has}, the config says {says}")
        self.layers.append(layer)
        return query


@torch.inference_mode()
def check_attention(model: PreTrainedModel, shape: ModelShape) -> None:
    """Raises ModelError unless every layer comes to the engine's attention, once and in the shape of the config."""
    name, witness = type(model).__name__, _Witness(shape)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        model(input_ids=token, position_ids=token, use_cache=False, logits_to_keep=1, specontext_step=witness)
    except NoStepError as error:
        raise ModelError(f"{name} is not supported: its layers do not pass on what the engine gives them") from error
    except ModelError as error:
        raise ModelError(f"{name} is not supported: {error}") from error
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise ModelError(f"{name} is not supported: it does not run as the engine runs models: {error}") from error
    if witness.layers != list(range(shape.layers)):
        numbers = ", ".join(map(str, witness.layers)) or "no layer"
        raise ModelError(f"{name} is not supported: of its {shape.layers} layers these have ordinary attention: {numbers}")
