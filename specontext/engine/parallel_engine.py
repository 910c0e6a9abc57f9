"""An engine whose model is shared by several processes of this machine, each with some heads and their KV (tensor parallelism).

    rank 0       LLMEngine: this process's           add_request, abort, step, ...
                    | the same calls, in the same order             |  sums of layers, rank 0's logits
    rank 1 ..    LLMEngine, in `rank_worker.py`  <--+               |

Every rank schedules by itself, and comes to the same: what could differ (free memory, speed of the machine) is agreed on when
they start, and each works with the logits of rank 0. With each step rank 0 says where it stands, and a rank that stands elsewhere
ends, which ends the engine.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from specontext.config import EngineConfig
from specontext.engine.generation import Generation
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.rank_processes import PATIENCE, START, Command, RankProcesses
from specontext.engine.rank_state import state_of
from specontext.engine.rank_worker import CLOSE
from specontext.engine.start import load_configured, pick_device
from specontext.errors import ConfigError, DeviceMemoryError, NamedRequestsError, SpeContextError, described
from specontext.memory.sharing import Share
from specontext.models.loading import LoadedModel
from specontext.models.ranks import Ranks
from specontext.sampling_params import SamplingParams


def make_engine(config: EngineConfig, loaded: LoadedModel | None = None) -> LLMEngine:
    """The engine that settings ask for.

    Args:
        loaded: a model that is loaded already; None loads `config.model`.

    Raises:
        SpeContextError: anything in the settings or the checkpoints that does not fit.
    """
    if config.tensor_parallel_size == 1:
        return LLMEngine(config, loaded)
    if loaded is not None:
        raise ConfigError("ranks load their parts of a model themselves: name the model, or leave tensor_parallel_size out")
    return ParallelEngine(config)


class ParallelEngine(LLMEngine):
    """Rank 0, with the processes of the others."""

    def __init__(self, config: EngineConfig) -> None:
        size, device = config.tensor_parallel_size, pick_device(config.device)
        if device.type == "cuda":
            if torch.cuda.device_count() < size:
                raise ConfigError(f"tensor_parallel_size {size} needs as many GPUs, and {torch.cuda.device_count()} are visible")
            device = torch.device("cuda:0")
            torch.cuda.set_device(device)
        threads = None
        if "OMP_NUM_THREADS" not in os.environ:  # the ranks share the cores
            threads = max(1, torch.get_num_threads() // size)
            torch.set_num_threads(threads)
        self._within = False
        ranks = Ranks(Share(0, size))
        self._processes = processes = RankProcesses(size, threads=threads, patience=PATIENCE[device.type])
        weakref.finalize(self, _end, processes, ranks)
        try:
            if device.type == "cuda":  # all load at the same time
                processes.begin(replace(config, device=device.type), ranks.port)
                loaded = load_configured(config, device, ranks)
            else:
                loaded = load_configured(config, device, ranks)
                dtype = str(loaded.shape.dtype).removeprefix("torch.")  # it may depend on what is free
                processes.begin(replace(config, device=device.type, dtype=dtype), ranks.port)
            processes.wait_ready()
            processes.on_loss.append(ranks.abort)
            with processes.due(START):
                ranks.connect(device)
                super().__init__(config, loaded)
        except BaseException as error:
            why = error if isinstance(error, SpeContextError | KeyboardInterrupt) else processes.loss(error)
            processes.end()
            ranks.abort()
            if why is error:
                raise
            raise why from error

    @contextmanager
    def _together(self, name: str, *arguments: object) -> Iterator[None]:
        """Inside, this rank does what all others are told to do.

        Raises:
            RankError: a rank is lost, or this one failed where the others may have gone on.
        """
        if self._within:  # what they are doing already
            yield
            return
        self._processes.tell(Command(name, arguments, state=state_of(self)))
        self._within = True
        try:
            with self._processes.due(START if name == "warm_up" else self._processes.patience):
                yield
            self._processes.raise_if_lost()  # what a GPU computed meanwhile is not to be trusted
        except BaseException as error:
            if isinstance(error, NamedRequestsError) and not isinstance(error, DeviceMemoryError):
                raise
            if not isinstance(error, Exception):  # Ctrl-C: the others are in the midst of it
                self._processes.give_up(f"rank 0 was interrupted in the midst of a {name}: start the engine again")
                raise
            why = self._processes.loss(error)
            if why is not error:
                raise why from error
            self._processes.give_up(f"rank 0 could not go on ({described(error)}): start the engine again")
            self._processes.raise_if_lost()
            raise
        finally:
            self._within = False

    def warm_up(self) -> None:
        with self._together("warm_up"):
            super().warm_up()

    def settle(self) -> None:
        with self._together("settle"):
            super().settle()

    def step(self, meanwhile: Callable[[], None] | None = None) -> list[Generation]:
        with self._together("step"):
            return super().step(meanwhile)

    def catch_up(self) -> list[Generation]:
        with self._together("catch_up"):
            return super().catch_up()

    def check_integrity(self) -> None:
        with self._together("check_integrity"):
            super().check_integrity()

    def reset_prefix_cache(self) -> None:
        with self._together("reset_prefix_cache"):
            super().reset_prefix_cache()

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        index: int = 0,
        forced: Sequence[int] = (),
        on_logits: Callable[[Tensor], None] | None = None,
        checked: bool = False,
        awaited: bool = True,
    ) -> Generation:
        self._processes.raise_if_lost()
        generation = super().add_request(
            request_id, prompt, params, index=index, forced=forced, on_logits=on_logits, checked=checked, awaited=awaited
        )
        if not self._within:
            request = generation.request
            options = {"index": index, "forced": list(generation.forced), "on_logits": on_logits and ignore}
            options |= {"checked": True, "awaited": awaited}
            named = replace(params, seed=request.seed)
            arguments = (request_id, list(request.token_ids), named)
            self._processes.tell(Command("add_request", arguments, tuple(options.items())))
        return generation

    def abort(self, request_id: str) -> None:
        """As of `LLMEngine`; also within a step, which may have broken here only."""
        known = request_id in self._generations
        super().abort(request_id)
        if known and not self._processes.lost:
            self._processes.tell(Command("abort", (request_id,)))

    def when_lost(self, notify: Callable[[], None]) -> None:
        self._processes.on_loss.append(notify)

    def raise_if_lost(self) -> None:
        self._processes.raise_if_lost()

    def close(self) -> None:
        if self.closed:
            return
        ranks = self.loaded.ranks
        if ranks is not None and self._processes.lost:
            ranks.abort()  # before anything waits for a device that waits for ranks that are gone
        super().close()
        if told := not self._processes.lost:
            self._processes.tell(CLOSE)
        self._processes.end(told=told)
        if ranks is not None:
            ranks.close()


def _end(processes: RankProcesses, ranks: Ranks) -> None:
    """Of an engine that nobody has closed."""
    processes.end()
    ranks.abort()


def ignore(logits: Tensor) -> None:
    """What other ranks do with logits that somebody wants to see."""
