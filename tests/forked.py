"""Processes forked from one that has imported all they need: an interpreter with these libraries takes seconds to start.

They are processes of their own nonetheless, run the same code, and can be killed and stopped. Tests of how ranks and servers
start begin them as users do.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

from specontext.cli import main
from specontext.engine import rank_worker

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([rank_worker.__name__, "specontext.server.run", __name__])
gc.freeze()  # what has been imported is neither looked through nor copied by each process


class Forked:
    """What tests and `RankProcesses` use of a `subprocess.Popen`."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._process: Any = SERVER.Process(target=target, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self.returncode


class ForkedRank(Forked):
    """As `python -m specontext.engine.rank_worker`."""

    def __init__(self, command: list[str], *, pass_fds: list[int], env: Mapping[str, str], start_new_session: bool) -> None:
        assert command[1:] == ["-m", rank_worker.__name__, str(pass_fds[0])] and start_new_session, "ranks are started otherwise"
        with Connection(os.dup(pass_fds[0])) as connection:
            super().__init__(_be_rank, connection, dict(env))


class ForkedCommand(Forked):
    """As `specontext ...`.

    Attributes:
        stdout: what it prints.
    """

    def __init__(self, words: list[str], stderr: int) -> None:
        read, write = os.pipe()
        self.stdout = open(read, encoding="utf-8")  # noqa: SIM115
        with Connection(write) as output, Connection(os.dup(stderr)) as errors:
            super().__init__(_run_command, words, output, errors)


def _start(command: list[str], *, stdout: Any, stderr: Any, start_new_session: bool = False, **_: Any) -> Forked:
    if stdout != subprocess.PIPE:
        assert stderr == subprocess.STDOUT
        return _started(command, stdout, stdout, start_new_session)
    with open(os.devnull, "w") if stderr == subprocess.DEVNULL else nullcontext(stderr) as said:
        return ForkedCommand(_words_of(command), said.fileno())


def _run_to_its_end(
    command: list[str], *, stdout: Any = None, stderr: Any = None, capture_output: bool = False, check: bool = False, **_: Any
) -> subprocess.CompletedProcess[str]:
    with TemporaryFile("w+", encoding="utf-8") as printed, TemporaryFile("w+", encoding="utf-8") as said:
        output = printed if capture_output or stdout == subprocess.PIPE else stdout
        code = _started(command, output, output if stderr == subprocess.STDOUT else said).wait()
        for file in (printed, said):
            file.seek(0)
        done = subprocess.CompletedProcess(command, code, printed.read(), said.read())
    if check:
        done.check_returncode()
    return done


def _started(command: list[str], output: Any, errors: Any, new_session: bool = False) -> Forked:
    with Connection(os.dup(output.fileno())) as one, Connection(os.dup(errors.fileno())) as other:
        return Forked(_run_command, _words_of(command), one, other, new_session)


def _words_of(command: list[str]) -> list[str]:
    """What follows the interpreter and the module of the command line, or a script and what follows it."""
    assert command[0] == sys.executable
    return command[3:] if command[1:3] == ["-m", "specontext.cli"] else command[1:]


# What `RankProcesses` uses of `subprocess`.
RANKS = SimpleNamespace(Popen=ForkedRank, TimeoutExpired=subprocess.TimeoutExpired)

# What scripts use of `subprocess` to run `python -m specontext.cli ...` and `python SCRIPT.py ...`.
COMMANDS = SimpleNamespace(
    Popen=_start,
    run=_run_to_its_end,
    **{name: getattr(subprocess, name) for name in ("PIPE", "STDOUT", "DEVNULL", "TimeoutExpired")},
)


def _be_rank(connection: Connection, environment: Mapping[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    sys.argv = [rank_worker.__name__, str(connection.fileno())]
    rank_worker.main()


def _run_command(words: list[str], output: Connection, errors: Connection, new_session: bool = False) -> None:
    if new_session:
        os.setsid()
    for own, given in ((1, output), (2, errors)):
        os.dup2(given.fileno(), own)
        given.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    if not words[0].endswith(".py"):
        sys.exit(main(words))
    sys.argv, sys.path = words, [str(Path(words[0]).parent), *sys.path]
    runpy.run_path(words[0], run_name="__main__")
