"""The processes that share one model: what they tell each other while they compute.

Groups are made here and belong to one engine; PyTorch's default group, of which a process has one, is left alone.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions
from torch.nn.functional import pad

from specontext.checkpoints.wording import in_one_sentence
from specontext.errors import RankError
from specontext.memory.sharing import Share
from specontext.models.near_sums import NearSums, near_sums

Result = TypeVar("Result")
LOCALHOST = "127.0.0.1"
# Ranks wait for each other so long: for a rank that hangs. One that dies is noticed at once, by its connections.
TIMEOUT = timedelta(minutes=5)
MEETING = timedelta(minutes=1)  # of ranks that have all loaded their parts


class Ranks:
    """This process among those that share a model.

    Attributes:
        share: its part.
        port: of the store by which ranks find each other, on this machine.
        near: what adds up small tensors, where the ranks' GPUs reach each other's memory.
    """

    def __init__(self, share: Share, port: int | None = None) -> None:
        self.share = share
        self._store: Any = dist.TCPStore(LOCALHOST, port or 0, None, port is None, TIMEOUT, False)
        self.port = int(self._store.port)
        self.near: NearSums | None = None
        self._host: Any = None
        self._device: Any = None
        self._apart = self._aborted = False

    def connect(self, device: torch.device) -> None:
        """Find the others; all of them have to call it, within a minute.

        Raises:
            RuntimeError: one is missing.
            RankError: their GPUs do not reach each other.
        """
        self._store.set_timeout(MEETING)
        gloo: Any = dist.ProcessGroupGloo  # its stubs lack what its own tests use
        options = gloo._Options()
        options._devices = [gloo.create_device(interface="lo")]
        options._timeout = TIMEOUT
        rank, size = self.share.rank, self.share.size
        self._host = self._device = gloo(dist.PrefixStore("host", self._store), rank, size, options)
        if device.type == "cuda":
            # Who waits too long is told by whoever steps; PyTorch's own way would end the process without a word.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = TIMEOUT
            try:
                self._device = dist.ProcessGroupNCCL(dist.PrefixStore("device", self._store), rank, size, nccl)
                self.sum_(torch.zeros(1, device=device))  # makes its communicator, which must not happen in a captured step
                torch.cuda.synchronize(device)
            except RuntimeError as error:
                raise RankError(
                    f"the GPUs do not reach each other through NCCL ({in_one_sentence(error)}): in a container give it more "
                    "shared memory (--shm-size 8g, or --ipc host), or leave tensor_parallel_size out"
                ) from error
            self.near = near_sums(self.share, self._store, self.port, device, self.least)

    @torch.compiler.disable
    def sum_(self, tensor: Tensor) -> None:
        """Add up the ranks' tensors, in place. On a GPU the host does not wait."""
        if self._apart:
            return
        if self.near is not None and not self._aborted and self.near.takes(tensor):
            self.near.sum_(tensor)
        else:
            _wait(self._device.allreduce([tensor], _on_this_stream(dist.AllreduceOptions())))

    @torch.compiler.disable
    def mean_(self, tensor: Tensor) -> None:
        """Take the mean of the ranks' tensors, in place. On a GPU the host does not wait."""
        if not self._apart:
            self.sum_(tensor)
            tensor.div_(self.share.size)

    @torch.compiler.disable
    def gather(self, part: Tensor, width: int) -> Tensor:
        """The ranks' parts behind each other, [..., width], the same on all. On a GPU the host does not wait.

        Args:
            part: [..., n] with n the same on all ranks, but for the last ones, which may have fewer.
        """
        size = self.share.size
        each = -(-width // size)
        padded = pad(part, (0, each - part.shape[-1])).reshape(-1, each).contiguous()
        if self._apart:
            parts = padded.repeat(size, 1)
        else:
            parts = padded.new_empty((size * len(padded), each))
            _wait(self._device._allgather_base(parts, padded, _on_this_stream(AllgatherOptions())))
        joined = parts.view(size, -1, each).movedim(0, 1).reshape(-1, size * each)
        return joined[:, :width].reshape(*part.shape[:-1], width)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, this rank computes with its own part, as if that were a model: nothing is added up."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def share_(self, tensor: Tensor) -> None:
        """Put rank 0's numbers into every rank's tensor. On a GPU the host does not wait."""
        self._broadcast(self._device, tensor)

    def least(self, number: int) -> int:
        """The least of the ranks' numbers."""
        return self._reduced(number, dist.ReduceOp.MIN)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return self._reduced(number, dist.ReduceOp.MAX)

    def decide(self, answer: Callable[[], Result]) -> Result:
        """What a function gives on rank 0, on every rank; it is called there only."""
        said = pickle.dumps(answer()) if self.share.rank == 0 else b""
        length = self.most(len(said))
        numbers = torch.frombuffer(bytearray(said.ljust(length, b"\0")), dtype=torch.uint8)
        self._broadcast(self._host, numbers)
        decided: Result = pickle.loads(numbers.numpy().tobytes())
        return decided

    def abort(self) -> None:
        """End what waits for a rank that is lost, from any thread."""
        if self._device is not self._host and not self._aborted:
            self._aborted = True
            if self.near is not None:
                self.near.release()  # first: NCCL's end may wait for all that the device was given
            self._device.abort()

    def close(self) -> None:
        """Let go of the others; captured steps must be gone."""
        if self.near is not None:
            if not self.near.idle():
                self.abort()
            self.near.close()
            self.near = None
        self.abort()
        self._host = self._device = self._store = None

    def _reduced(self, number: int, how: Any) -> int:
        numbers = torch.tensor([number], dtype=torch.int64)
        self._host.allreduce([numbers], how).wait()
        return int(numbers)

    @staticmethod
    def _broadcast(group: Any, tensor: Tensor) -> None:
        options = _on_this_stream(dist.BroadcastOptions())
        options.rootRank = options.rootTensor = 0
        _wait(group.broadcast([tensor], options))


def _on_this_stream(options: Any) -> Any:
    """Has a GPU do it on the stream that computes, rather than on another one that has to wait for it and is waited for."""
    options.asyncOp = False
    return options


def _wait(work: Any) -> None:
    """NCCL gives nothing to wait for where the stream does."""
    if work is not None:
        work.wait()
