"""Data sets of the Hugging Face Hub by name, and what to do where one cannot be loaded."""

from __future__ import annotations

import importlib
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from specontext.errors import HubError
from specontext.installing import install_command

# Data sets that the Hub keeps as loading scripts, and copies of them in Parquet.
COPIES = {
    "THUDM/LongBench": "Xnhyacinth/LongBench",
    "zai-org/LongBench": "Xnhyacinth/LongBench",
    "deepmind/pg19": "emozilla/pg19",
    "pg19": "emozilla/pg19",
}
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_SCRIPT = re.compile(r"Dataset scripts are no longer supported, but found (?P<script>\S+)")
_NO_SUBSET = re.compile(r"Config name is missing\.\s*Please pick one among the available configs: \[(?P<names>[^\]]*)\]")
_OTHER_SUBSETS = re.compile(r"BuilderConfig .* not found\. Available: \[(?P<names>[^\]]*)\]")
_OTHER_SPLITS = re.compile(r"Unknown split .*\. Should be one of \[(?P<names>[^\]]*)\]")


def load_split(name: str, subset: str | None, split: str, *, extra: str) -> Any:
    """One split of a data set as a table of the package `datasets`: rows by number, `column_names`.

    Args:
        name: `organisation/name` (a directory of that name goes first, as `datasets` has it).
        extra: of this package, which installs `datasets`.

    Raises:
        HubError: the package is not installed, or the data set cannot be loaded; the message is the reason alone.
    """
    datasets = _datasets(f"{name}{f'/{subset}' if subset else ''}:{split}", extra)
    try:
        return datasets.load_dataset(name, *([subset] if subset else []), split=split)
    except Exception as error:  # the library and what it calls raise many kinds
        raise HubError(_reason(name, subset, split, error)) from error


def load_parquet(path: Path, *, extra: str) -> Any:
    """The rows of a Parquet file as a table of the package `datasets`; otherwise as `load_split`."""
    datasets = _datasets(str(path), extra)
    try:
        return datasets.load_dataset("parquet", data_files=[str(path)], split="train")
    except Exception as error:
        raise HubError(_one_line(error)) from error


def fetch_file(name: str, file: str) -> Path:
    """A file of a data set, downloaded unless it is already here.

    Raises:
        HubError: it cannot be had; the message is the reason alone.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except Exception as error:
        raise HubError(_reason(name, None, "", error)) from error


def _datasets(what: str, extra: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise HubError(f"{what} needs the package datasets: {install_command(extra)}") from error
    if not sys.stderr.isatty():
        with suppress(AttributeError):  # of stand-ins, and of versions that name it otherwise
            datasets.disable_progress_bars()
    return datasets


def _reason(name: str, subset: str | None, split: str, error: Exception) -> str:
    """Why it failed, and what to write or do instead."""
    text = _one_line(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if script := _SCRIPT.search(text):
        copy = f"name its copy {COPIES[name]}, or " if name in COPIES else "name a copy of it in Parquet or JSON, or "
        return (
            f"it is kept as a loading script ({script['script']}), which the package datasets no longer runs; {copy}download the "
            f"Parquet files that the Hub made of it, where it did, and give DIR or a part of it: hf download {name} "
            "--repo-type dataset --revision refs/convert/parquet --local-dir DIR"
        )
    if subsets := _NO_SUBSET.search(text):
        return f"it has several subsets, write {name}/SUBSET: {_listed(subsets)}"
    if subsets := _OTHER_SUBSETS.search(text):
        return f"it has no subset '{subset}', its subsets are: {_listed(subsets)}"
    if splits := _OTHER_SPLITS.search(text):
        return f"it has no split '{split}', write :SPLIT behind the name, one of: {_listed(splits)}"
    if "gated dataset" in text or "GatedRepoError" in kinds:
        return f"it is gated; ask for access at https://huggingface.co/datasets/{name}, then {_LOG_IN}"
    if "doesn't exist on the Hub" in text or "RepositoryNotFoundError" in kinds:
        return f"the Hub has none of that name, or it is private; check the name, or {_LOG_IN}"
    if isinstance(error, ConnectionError) or kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return "the Hub cannot be reached, and there is no copy here; connect, or download it elsewhere and give the files"
    return text


def _listed(match: re.Match[str]) -> str:
    return match["names"].replace("'", "").replace('"', "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
