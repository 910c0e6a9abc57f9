"""The command line: one file a verb; options come from the fields of the settings.

What verbs do lives in the engine and in evaluation; only parsing and printing live here.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence

_COMPLETION = "_SPECONTEXT_COMPLETE"  # by which a shell asks for completions
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for bad usage, 1 for other errors a user can cause.

    Args:
        arguments: words after the program's name, by default those of the process.
    """
    if _COMPLETION in os.environ:
        os.environ["COLUMNS"] = "10000"  # shells take a line for a completion: descriptions must not be wrapped
    from specontext.cli.app import app
    from specontext.errors import SpeContextError, shown

    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text that the terminal cannot show must not end the program
    try:
        try:
            app(args=arguments, prog_name="specontext")
        finally:
            sys.stdout.flush()  # what cannot be written is an error, and not one of the interpreter's end
    except SpeContextError as error:
        _say(str(error))
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # whoever read it has had enough
            return 1
        if error.errno not in _NO_ROOM and error.filename is None:
            raise
        if error.errno not in _NO_ROOM:
            _say(f"cannot use {shown(os.fspath(error.filename))}: {error.strerror}; name another path, or mend this one")
            return 1
        where = f" {error.filename}" if error.filename else ""
        _say(f"cannot write{where or ' all of the output'}: {error.strerror}; make room, or write to another place")
        return 1
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        return 130
    return 0


def _say(error: str) -> None:
    with contextlib.suppress(OSError):
        print(f"error: {error}", file=sys.stderr)


def _open_what_is_closed() -> None:
    """Standard streams that the caller has closed read nothing and write nowhere, and no file is opened in their places."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
