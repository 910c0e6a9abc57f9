"""What transformers says of loading: every tensor of a checkpoint has a place in the decoder, and every place a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from specontext.checkpoints.quantization import ADVICE
from specontext.checkpoints.weights import StoredTensor, is_buffer
from specontext.checkpoints.wording import first_few
from specontext.errors import ModelError
from specontext.locations import part_of
from specontext.models.language_model import is_other_modality

SCALES = re.compile(r"scale|zero|qweight|g_idx|absmax|quant|packed|amax")  # in the names of what quantised weights come with
NEXT_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
NEXT_TOKEN_PART = re.compile(r"(^|\.)mtp(_\w+)?\.")  # layers that predict further tokens, which no decoder here runs

Tensors = Mapping[str, StoredTensor]


def check_report(source: object, model: PreTrainedModel, report: Mapping[str, Any], stored: Tensors) -> None:
    """Raises ModelError, naming tensors, unless files and decoder have the same ones in the same shapes."""
    kind = type(model).__name__
    mismatched = {name: (list(found), list(asked)) for name, found, asked in sorted(report["mismatched_keys"])}
    wrong = []
    if missing := sorted(set(report["missing_keys"]) - mismatched.keys()):  # transformers would put random numbers in their place
        wrong.append(f"they are incomplete and lack {first_few(missing)}")
    if mismatched:
        shown = [f"{name} has shape {found} where the config asks for {asked}" for name, (found, asked) in mismatched.items()]
        wrong.append(first_few(shown))
    extra = _not_taken(report["unexpected_keys"], model.config, stored)
    if extra:
        wrong.append(f"{first_few(extra)} {'is' if len(extra) == 1 else 'are'} not taken by {kind}")
    if not wrong:
        return
    if any(SCALES.search(name.rpartition(".")[2]) for name in extra):
        remedy = f"these weights look quantised: {ADVICE}"
    elif missing and not extra and not mismatched:
        remedy = "download the checkpoint again, whole"
    else:
        remedy = "take the config.json that belongs to these weights, or a checkpoint whose architecture is supported as it is"
    raise ModelError(f"the weights of {source} do not fit its config: {'; '.join(wrong)}; {remedy}")


def _not_taken(names: Iterable[str], config: PreTrainedConfig, stored: Tensors) -> list[str]:
    """Those of the tensors that the decoder left aside that it should have had."""
    layers = int(getattr(config, "num_hidden_layers", 0))
    further = max(int(getattr(config, key, None) or 0) for key in NEXT_TOKENS)

    def predicts_further(name: str) -> bool:
        number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        return bool(NEXT_TOKEN_PART.search(name)) or (number is not None and layers <= int(number[1]) < layers + further)

    def left_out(name: str) -> bool:
        other = bool(part_of(config)) and is_other_modality(name)
        return other or predicts_further(name) or is_buffer(name, stored.get(name))

    return sorted(name for name in names if not left_out(name))


@contextmanager
def no_report() -> Iterator[None]:
    """Keeps transformers from logging its table of what does not fit, and that it can be ignored: it is refused by name here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(max(before, transformers_logging.ERROR))
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
