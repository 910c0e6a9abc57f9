"""The command line: one file a verb; options come from the fields of the settings.

What verbs do lives in the engine and in evaluation; only parsing and printing live here.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for bad usage, 1 for other errors a user can cause.

    Args:
        arguments: words after the program's name, by default those of the process.
    """
    from specontext.cli.app import app
    from specontext.errors import SpeContextError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text that the terminal cannot show must not end the program
    try:
        app(args=arguments, prog_name="specontext")
    except SpeContextError as error:
        with contextlib.suppress(BrokenPipeError):
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        return 130
    return 0
