"""Ranks forked from one process that has imported all they need: an interpreter with these libraries takes seconds to start.

They are processes with connections of their own nonetheless, run the same code, and can be killed and stopped. Tests of how ranks
start and end begin them as users' engines do.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from specontext.engine import rank_worker

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([rank_worker.__name__, "tests.forked_ranks"])


def work(connection: Connection, environment: Mapping[str, str]) -> None:
    """Be a rank, as `python -m specontext.engine.rank_worker` is one."""
    os.setsid()
    os.environ.update(environment)
    sys.argv = [rank_worker.__name__, str(connection.fileno())]
    rank_worker.main()


class ForkedRank:
    """What `RankProcesses` uses of a `subprocess.Popen`."""

    def __init__(self, command: list[str], *, pass_fds: list[int], env: Mapping[str, str], start_new_session: bool) -> None:
        assert command[1:] == ["-m", rank_worker.__name__, str(pass_fds[0])] and start_new_session, "ranks are started otherwise"
        with Connection(os.dup(pass_fds[0])) as connection:
            self._process: Any = SERVER.Process(target=work, args=(connection, dict(env)))
            self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        return self.returncode
