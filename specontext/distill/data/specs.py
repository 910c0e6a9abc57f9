"""From what a user writes to a source."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.checkpoints.files import user_path
from specontext.distill.data.documents import Documents, Joined, TextFiles
from specontext.distill.data.encoder import Encoder
from specontext.distill.data.hub import hub_rows, parquet_rows
from specontext.distill.data.jsonl import JsonLines
from specontext.distill.data.mixing import Weighted
from specontext.distill.data.source import DataError, Source
from specontext.distill.data.tasks import TaskSource
from specontext.distill.data.text import DocumentSource
from specontext.tasks.training import KINDS

FORMS = (
    "'tasks', 'tasks:KIND,KIND', a text file, a .jsonl or .parquet file, a directory of these, or "
    "hf:ORGANISATION/NAME[/SUBSET][:SPLIT[:FIELD]]"
)
_ROWS: dict[str, Callable[[Path, Encoder], Documents]] = {".jsonl": JsonLines, ".ndjson": JsonLines, ".parquet": parquet_rows}
TABLES = (".json", ".csv", ".tsv")  # which hold rows too; in directories, such as of code, they are texts like any other
TEXTS = (".txt", ".md")
PROBED = 4096  # bytes of a file in a directory that are looked at to tell text from other data


def open_sources(
    specs: Sequence[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    held_out: bool = False,
    vocab_size: int | None = None,
) -> Source:
    """The source that draws from everything that `specs` name, evenly or by weights.

    `tasks` or `tasks:KIND,KIND` are generated problems. A `.jsonl` (`.ndjson`) or `.parquet` file has a document in every row
    (see `rows.document` for the forms), any other file is a text, but for tables (`.json`, `.csv`, `.tsv`) that are named
    themselves. A directory is all of these below it, sorted by path; hidden files and files that are not text are left out,
    but for those that are called so (`.txt`, `.md`), which must be UTF-8.
    `hf:org/name:split:field` is a data set of the Hub. Each of these may end with `=WEIGHT`: sequences come from it as often as
    from one without, times WEIGHT.

    Args:
        held_out: open the part that is kept from training, disjoint from what is opened without it whatever the seeds: of ten
            or more documents every tenth, of fewer text files the last tenth of each, of fewer rows the last row (see
            `held_out.Split`). Generated problems are held out by other random numbers.
        vocab_size: rows of the embedding of the model that will read the sequences, where there is one; no source gives a token
            beyond it.

    Raises:
        DataError: a spec or weight that is not understood, data that cannot be read or used, fewer than two tokens in any.
    """
    listed = [specs] if isinstance(specs, str | Path) else list(specs)
    if not listed:
        raise DataError(f"no data was given: give {FORMS}")
    encoder = Encoder(tokenizer, vocab_size)
    parts = [with_weight(str(spec)) for spec in listed]
    sources = [_open(spec, encoder, f"{seed}/{number}", held_out) for number, (spec, _) in enumerate(parts)]
    return sources[0] if len(sources) == 1 else Weighted(sources, [weight for _, weight in parts], seed)


def with_weight(spec: str) -> tuple[str, float]:
    """What a spec names, and its weight: `corpus.jsonl=0.3`; 1 where it says none. A file's own name may have a '='.

    Raises:
        DataError: a weight that is no number above 0.
    """
    name, sign, written = spec.rpartition("=")
    if not sign or (not spec.startswith(("tasks", "hf:")) and user_path(spec, DataError).exists()):
        return spec, 1.0
    try:
        weight = float(written)
    except ValueError:
        return spec, 1.0  # what is not there is said where it is opened
    if not 0 < weight < math.inf:
        raise DataError(f"the weight of {name} must be a number above 0, got {written}")
    return name, weight


def _open(spec: str, encoder: Encoder, key: str, held_out: bool) -> Source:
    if spec == "tasks" or spec.startswith("tasks:"):
        kinds = [kind.strip() for kind in spec.removeprefix("tasks:").split(",")] if ":" in spec else KINDS
        return TaskSource(kinds, encoder, key=f"{'held out' if held_out else 'training'}/{key}")
    return DocumentSource(open_documents(spec, encoder), encoder, name=spec, key=key, held_out=held_out)


def open_documents(spec: str, encoder: Encoder) -> Documents:
    """All documents of a text, rows or a data set, no part held out.

    Raises:
        DataError: data that cannot be found or is none.
    """
    return hub_rows(spec, encoder) if spec.startswith("hf:") else _local(user_path(spec, DataError), encoder)


def _local(path: Path, encoder: Encoder) -> Documents:
    if path.is_dir():
        return _directory(path, encoder)
    if not path.is_file():
        raise DataError(f"there is no file or directory {path}: give {FORMS}")
    if path.suffix.lower() in TABLES:
        raise DataError(
            f"{path} would be read as one text: give its rows as a .jsonl or .parquet file, or the text as a .txt file"
        )
    rows = _ROWS.get(path.suffix.lower())
    return rows(path, encoder) if rows is not None else TextFiles([path], encoder)


def _directory(folder: Path, encoder: Encoder) -> Documents:
    """Text files first, then the rows of JSONL and Parquet files.

    Raises:
        DataError: there are none, or one that is called a text is none.
    """
    visible = [path for path in sorted(folder.rglob("*")) if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    files = [path for path in visible if path.is_file()]
    others = [path for path in files if path.suffix.lower() not in _ROWS]
    texts = [path for path in others if is_text(path)]
    if lost := [path for path in others if path.suffix.lower() in TEXTS and path not in set(texts)]:
        raise DataError(f"{lost[0]} is no UTF-8 text, as its name says: convert it, or move it out of {folder}")
    parts: list[Documents] = [rows(path, encoder) for path in files if (rows := _ROWS.get(path.suffix.lower())) is not None]
    if texts:
        parts.insert(0, TextFiles(texts, encoder))
    if not parts:
        raise DataError(f"{folder} has no text files and no .jsonl files, and no .parquet files")
    return parts[0] if len(parts) == 1 else Joined(parts)


def is_text(path: Path) -> bool:
    """Whether a file begins like UTF-8 text.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(PROBED)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start > PROBED - 4  # a character that the probe cut
    return b"\0" not in start
