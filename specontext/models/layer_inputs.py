"""Tables of embeddings that single layers read, beside that of all tokens (Gemma 3n and 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specontext.models.decoder import decoder_of


def read_short_tables(model: PreTrainedModel) -> None:
    """Have ids that a table of layers lacks read its first row, as newer versions of the library do: older ones read past its
    end, which on a GPU ends the process.

    Ids that tables of layers lack stand for parts of images and sounds; a model may write one all the same.
    """
    table = getattr(decoder_of(model), "embed_tokens_per_layer", None)
    if isinstance(table, nn.Embedding) and table.num_embeddings < model.config.vocab_size:
        table.register_forward_pre_hook(_within)


def _within(table: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.where(args[0] < table.num_embeddings, args[0], 0),)
