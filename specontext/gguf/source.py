"""What a converted checkpoint was made from, as stands in its `source.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSION = 3  # of what the converter writes; a higher one converts anew
SOURCE = "source.json"


def source_of(folder: Path | str | None) -> dict[str, Any]:
    """The values of a converted checkpoint's `source.json`; none for any other directory."""
    try:
        values = json.loads((Path(folder) / SOURCE).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def weights_note(folder: Path | str | None) -> str | None:
    """What was done to the weights, such as 'dequantised from Q4_1'; None where they are the checkpoint's own."""
    note = source_of(folder).get("weights")
    return str(note) if note else None
