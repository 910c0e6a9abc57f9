"""Ranks as threads of one process: what they compute together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from specontext.errors import ModelError
from specontext.memory.sharing import Share
from specontext.models.attention import attention_of
from specontext.models.loading import LoadedModel, load_model
from specontext.models.ranks import Ranks

CPU = torch.device("cpu")
PLANS_ARE_WHOLE = Version("5.24")  # of transformers: older versions lack plans of some architectures


def logits_of(loaded: LoadedModel) -> Tensor:
    """Of 60 tokens, with the library's own attention, so that all that is tried is what ranks have of the weights."""
    with torch.no_grad(), attention_of(loaded.model, "eager"):
        logits: Tensor = loaded.model(input_ids=4 + 7 * torch.arange(60)[None], use_cache=False).logits
    return logits[0]


def check(folder: Path, size: int) -> LoadedModel:
    """Compares the logits of so many ranks with those of one process; gives the last rank's part."""
    first = Ranks(Share(0, size))
    all_ranks = [first, *(Ranks(Share(rank, size), first.port) for rank in range(1, size))]
    try:
        parts = [load_model(folder, dtype="float32", device=CPU, ranks=ranks) for ranks in all_ranks]
    except ModelError as error:
        if "not in its plan" in str(error) and Version(transformers.__version__) < PLANS_ARE_WHOLE:
            pytest.skip("this version of transformers has no whole plan of these models")
        raise

    def run(ranks: Ranks, part: LoadedModel) -> Tensor:
        ranks.connect(CPU)
        try:
            return logits_of(part)
        finally:
            ranks.close()

    expected = logits_of(load_model(folder, dtype="float32", device=CPU))
    with ThreadPoolExecutor(size) as threads:
        for found in threads.map(run, all_ranks, parts):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return parts[-1]
