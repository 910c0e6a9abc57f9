"""What to type to install more of this package, in the way in which it was installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse


def install_command(extra: str) -> str:
    """The command that installs one of the package's extras into the environment that runs now."""
    source = editable_source()
    what = shlex.quote(f"{_short(source)}[{extra}]" if source is not None else f"specontext[{extra}]")
    return f"{pip()} install {'-e ' if source is not None else ''}{what}"


def pip() -> str:
    """How pip is called for this environment: by its name where that finds it, else through this Python."""
    bin_folder = Path(sys.executable).parent
    on_path = any(Path(entry) == bin_folder for entry in os.environ.get("PATH", "").split(os.pathsep) if entry)
    return "pip" if on_path else f"{shlex.quote(_short(Path(sys.executable)))} -m pip"


def editable_source() -> Path | None:
    """The checkout that the package is installed from, if it is one that can be edited."""
    try:
        text = importlib.metadata.distribution("specontext").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = json.loads(text) if text else {}
    if not found.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(found["url"]).path))


def _short(path: Path) -> str:
    """A path as seen from the working directory, where it is below it."""
    try:
        relative = path.relative_to(Path.cwd())
    except ValueError:
        return str(path)
    return "." if relative == Path() else str(relative)
