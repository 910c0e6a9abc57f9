"""Which retrieval heads an evaluation's samples were made with: a head that was trained again has the same name."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specontext.evaluation.samples import EvaluationError
from specontext.retrieval.head import RetrievalHead


class KnownHeads:
    """Fingerprints of heads.

    Args:
        folder: of the evaluation, for messages.
        meta: what an earlier run has written about itself, if any.

    Attributes:
        prints: by the names that heads were asked for by.
    """

    def __init__(self, folder: Path, meta: dict[str, Any] | None) -> None:
        self._folder = folder
        self.prints: dict[str, str] = dict((meta or {}).get("heads", {}))
        # Engines are asked for once a cell, and have the same head for many; one that is closed gives its memory back.
        self._last: Callable[[], RetrievalHead | None] = lambda: None

    def check(self, name: object, head: RetrievalHead | None) -> None:
        """Take notice of a head that is going to be used; raises EvaluationError where another one had its name before."""
        if head is None or head is self._last():
            return
        self._last = weakref.ref(head)
        found = fingerprint_of_head(head)
        if self.prints.setdefault(str(name), found) != found:
            raise EvaluationError(
                f"{self._folder} has results of another retrieval head (that of {name} is another one now): "
                "choose another directory"
            )


def fingerprint_of_head(head: RetrievalHead) -> str:
    """Tells heads apart that have other weights or another head map; the same on a CPU and a GPU, in one number format."""
    digest = hashlib.sha256(repr(head.config.head_map).encode())
    for name, numbers in sorted(head.state_dict().items()):
        digest.update(name.encode() + numbers.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
