"""Ctrl-C while an engine works.

A step that is left halfway has given pages to requests that nobody knows of any more; so an interruption waits until it is over.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interruptions:
    """Within, Ctrl-C waits: until it is asked for, or for the end.

    What the program does with Ctrl-C is left to it: its own handler is called then. Outside of the main thread, where Python
    brings none, and where the program has no handler, nothing is changed.
    """

    def __init__(self) -> None:
        self._frames: list[FrameType | None] = []  # where they came
        found = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
        self._handler = found if callable(found) else None

    def __enter__(self) -> Self:
        if self._handler is not None:
            signal.signal(signal.SIGINT, lambda number, frame: self._frames.append(frame))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.let_through()

    def let_through(self) -> None:
        """Have what came be handled now, which mostly raises KeyboardInterrupt."""
        if self._frames and self._handler is not None:
            frame = self._frames[0]
            self._frames.clear()
            self._handler(signal.SIGINT, frame)
