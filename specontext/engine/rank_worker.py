"""The process of a rank other than the first: its own engine, which does what rank 0's does, in the same order.

Everything that an engine decides follows from its settings, its requests and their tokens, and from a few numbers that ranks
agree on when they start (`settled.py`, `build.py`). So nothing of a step has to be sent but that there is one.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection

import torch

from specontext.engine.llm_engine import LLMEngine
from specontext.engine.long_lived import keep_for_good
from specontext.engine.rank_processes import READY, Command, Setup
from specontext.engine.rank_state import state_of
from specontext.engine.start import load_configured
from specontext.errors import DeviceMemoryError, NamedRequestsError, RankError, SpeContextError, described
from specontext.kv.nearby import stay_near
from specontext.models.ranks import Ranks

CLOSE = Command("close")


def work(connection: Connection) -> None:
    """Carry out rank 0's commands until it closes its engine, or is gone.

    Raises:
        Exception: whatever keeps this rank from going on.
    """
    setup = connection.recv()
    assert isinstance(setup, Setup)
    rank = setup.share.rank
    device = torch.device("cpu" if setup.config.device == "cpu" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stay_near(device)
    ranks = Ranks(setup.share, setup.port)
    loaded = load_configured(setup.config, device, ranks)
    connection.send(READY)
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    ranks.connect(device)
    engine = LLMEngine(setup.config, loaded)
    while (command := inbox.get()) != CLOSE:
        carry_out(engine, command)
        if command.name == "warm_up":
            keep_for_good()


def carry_out(engine: LLMEngine, command: Command) -> None:
    """Do what rank 0 does.

    Raises:
        RankError: this engine is not where rank 0's is.
    """
    if command.state is not None and (found := state_of(engine)) != command.state:
        raise RankError(f"the ranks disagree: {found} here and {command.state} at rank 0")
    try:
        getattr(engine, command.name)(*command.arguments, **dict(command.options))
    except DeviceMemoryError:  # of this device: others may have gone on
        raise
    except NamedRequestsError:  # rank 0 says so, and the requests have ended here too
        pass


def _receive(connection: Connection, inbox: queue.SimpleQueue[Command]) -> None:
    """Put commands into the inbox; the process ends when rank 0 is gone, whatever it waits for."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        work(connection)
    except (EOFError, KeyboardInterrupt):
        code = 0
    except BaseException as error:
        if not isinstance(error, SpeContextError):
            traceback.print_exc()
        connection.send(str(error) if isinstance(error, SpeContextError) else described(error))
        code = 1
    else:
        code = 0
    sys.stderr.flush()
    os._exit(code)  # threads of collectives may wait for ranks that are gone


if __name__ == "__main__":
    main()
