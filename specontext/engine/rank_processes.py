"""The processes of the other ranks, as rank 0 sees them: it starts them, tells them what to do, and notices when one is lost.

Each has a connection of its own. Commands go one way; the other way comes that a rank is ready, or why it is not.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from specontext.config import EngineConfig
from specontext.errors import RankError, SpeContextError
from specontext.memory.sharing import Share

READY = "ready"
PATIENCE = {"cpu": 600.0, "cuda": 120.0}  # seconds for one step; no step takes so long
START = 1800.0  # seconds for compiling, capturing and pinning
LOOK = 1.0  # seconds between two looks at the clock
GRACE = 5.0  # seconds that a rank has to end, and rank 0 to hear why one has ended


@dataclass(frozen=True)
class Setup:
    """What a rank begins with."""

    config: EngineConfig
    share: Share
    port: int


@dataclass(frozen=True)
class Command:
    """What all ranks do at the same point.

    Attributes:
        state: the engine's, before it is carried out, as rank 0 knows it; None where it may differ.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    state: object = None


class RankProcesses:
    """Ranks 1 and up.

    Attributes:
        patience: seconds that a command may take; a rank that hangs without dying is lost then.
        on_loss: called by another thread, once, when a rank is lost.
    """

    def __init__(self, size: int, *, threads: int | None, patience: float) -> None:
        self.patience = patience
        self.on_loss: list[Callable[[], None]] = []
        self._due = math.inf
        self._lost: SpeContextError | None = None
        self._ready: set[int] = set()
        self._ending = False
        self._changed = threading.Condition()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        for _ in range(1, size):
            ours, theirs = multiprocessing.Pipe()
            command = [sys.executable, "-m", "specontext.engine.rank_worker", str(theirs.fileno())]
            environment = limit | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            # A session of its own: Ctrl-C is for rank 0, which has the others finish first.
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        threading.Thread(target=self._watch, name="specontext-ranks", daemon=True).start()

    def begin(self, config: EngineConfig, port: int) -> None:
        """Have all ranks load the model."""
        for number, connection in enumerate(self._connections, 1):
            self._send(connection, Setup(config, Share(number, len(self._connections) + 1), port))

    def wait_ready(self) -> None:
        """Wait until all have loaded it.

        Raises:
            SpeContextError: why one has not.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self._ready) == len(self._connections))
        self.raise_if_lost()

    def tell(self, command: Command) -> None:
        """Have all ranks carry out a command.

        Raises:
            RankError: one is lost.
        """
        self.raise_if_lost()
        for connection in self._connections:
            self._send(connection, command)

    def _send(self, connection: Connection, what: object) -> None:
        with contextlib.suppress(OSError):  # it is lost: the thread that watches says so
            connection.send(what)

    @property
    def pids(self) -> list[int]:
        """Their processes, rank 1 first."""
        return [process.pid for process in self._processes]

    @property
    def lost(self) -> bool:
        return self._lost is not None

    @contextmanager
    def due(self, seconds: float) -> Iterator[None]:
        """Inside is what all ranks do together: if it takes longer, one is lost."""
        self._due = time.monotonic() + seconds
        try:
            yield
        finally:
            self._due = math.inf

    def raise_if_lost(self) -> None:
        """Raises RankError for a rank that is lost."""
        if self._lost is not None:
            raise RankError(str(self._lost)) from self._lost

    def loss(self, otherwise: BaseException) -> BaseException:
        """Why rank 0 could not go on: because another is lost, as will be known in a moment, or something else."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, timeout=GRACE)
        return otherwise if self._lost is None else self._lost

    def _watch(self) -> None:
        open_ = dict(zip(self._connections, range(1, len(self._connections) + 1), strict=True))
        while open_:
            try:
                said_something = wait(list(open_), timeout=LOOK)
            except OSError:
                if self._ending:  # and closed them, before they could be waited for
                    return
                raise
            for connection in said_something:
                assert isinstance(connection, Connection)
                rank = open_[connection]
                try:
                    said = connection.recv()
                except (EOFError, OSError):
                    said = None
                if said == READY:
                    with self._changed:
                        self._ready.add(rank)
                        self._changed.notify_all()
                    continue
                del open_[connection]
                if not self._ending and self._lost is None:
                    self._lose(f"rank {rank} of {len(self._connections) + 1} is lost ({said or self._end_of(rank)})")
            if time.monotonic() > self._due and not self._ending and self._lost is None:
                self._lose(f"a rank hangs: all have been at one step for more than {self.patience:g} s")

    def _end_of(self, rank: int) -> str:
        process = self._processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return f"its process has ended with code {process.returncode}"

    def _lose(self, what: str) -> None:
        """A rank has said why it cannot go on, is gone, or hangs: the others cannot go on either."""
        why = f"{what}: start the engine again"
        with self._changed:
            self._lost = RankError(why)
            self._changed.notify_all()
        for other in self._processes:
            other.kill()
        for notify in self.on_loss:
            notify()

    def give_up(self, why: str) -> None:
        """End them because rank 0 cannot go on; whoever asks again is told why."""
        self._lost = self._lost or RankError(why)
        self.end()

    def end(self, *, told: bool = False) -> None:
        """End them all.

        Args:
            told: they have been told to close, and get a while for it.
        """
        self._ending = True
        if not told:
            for process in self._processes:
                process.kill()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.close()
        for process in self._processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
