"""Write the table of docs/models.md from the architectures that the tests run (tests/models/architectures.py).

python scripts/models_table.py            # writes it
python scripts/models_table.py --check    # says whether it is up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "models.md"
MARK = "<!-- written by scripts/models_table.py -->\n"
# What tests/models/test_architectures.py, and the tests with tests/conftest.py's families, show of every architecture.
SHOWN = ("tokens equal Hugging Face's", "speculative with a head in the model's shape", "its own `generate()`")


def table() -> str:
    """The table, in Markdown.

    Raises:
        SystemExit: an architecture of the tests without examples, or the other way round.
    """
    sys.path.insert(0, str(ROOT))
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    from tests.conftest import FAMILIES
    from tests.models.architectures import EXAMPLES, MULTIMODAL, RUN

    tested = {name.lower() for name in (*RUN, *FAMILIES)}
    if odd := sorted(tested ^ {name.lower() for name in EXAMPLES}):
        raise SystemExit(f"tests/models/architectures.py: {', '.join(odd)} stand in RUN or in EXAMPLES, and not in both")
    rows = [("architecture", "for example", *SHOWN), ("---",) * (2 + len(SHOWN))]
    for name, examples in EXAMPLES.items():
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[getattr(transformers, f"{name}Config").model_type]
        rows.append((f"`{architecture}`", ", ".join(examples), *["yes"] * len(SHOWN)))
    for name, examples in MULTIMODAL.items():
        architecture = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[getattr(transformers, f"{name}Config").model_type]
        rows.append((f"`{architecture}`, text alone", ", ".join(examples), "yes", "yes", "no"))
    ruled = [f"| {' | '.join(row)} |" if row[0] != "---" else f"|{'|'.join(row)}|" for row in rows]
    return "\n".join(ruled) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(arguments)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARK)
    _, _, after = rest.partition("\n\n")
    written = f"{before}{MARK}{table()}\n{after}"
    if asked.check:
        print("up to date" if written == text else "docs/models.md is not up to date: run scripts/models_table.py")
        return int(written != text)
    DOCUMENT.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
