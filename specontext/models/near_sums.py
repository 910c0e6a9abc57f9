"""Sums of small tensors among GPUs that reach each other's memory: every rank reads what the others have and adds it up.

    buffer of each rank     its numbers, where all others can read them   (PyTorch's symmetric memory)
    one kernel              signals the others, waits for theirs, adds up all buffers in the order of ranks, and signals and
                            waits once more, so that a buffer may be written again

A kernel that waits for a rank that is lost would wait for ever, and whoever waits for the device with it: `release` gives it the
signals that it waits for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specontext.checkpoints.wording import in_one_sentence
from specontext.memory.sharing import Share

logger = logging.getLogger("specontext")
c10d: Any = torch._C._distributed_c10d  # its stubs say less than it has
NUMBER_FORMATS = (torch.float32, torch.bfloat16)  # the only ones that PyTorch's kernel adds up
# Bytes of the largest sums: each rank reads the whole of all tensors, of which NCCL has it read parts, so NCCL wins in the end.
LARGEST = 512 << 10
WORD = 4  # bytes that a thread of the kernel reads at least
ALIGNED = 16  # bytes, and at most
BLOCKS = 24  # of the kernel, at most; each has a word for each rank among the signals
REHEARSAL_S = 20.0  # for the first sum, before which all ranks have said that they are ready

# How waiting kernels are let go: rounds that are queued ahead, since a driver that waits for the device may take nothing more.
ROUNDS = 16  # in one captured piece
PAUSE = 200_000  # clock cycles after a round, about a tenth of a millisecond
PIECES = 500  # queued at a time, so for most of a second; a step waits twice for each of its sums, in about as many rounds
RELEASE_S = 30.0  # after which no step of an engine that has lost a rank is launched any more
GRACE_S = 5.0  # for sums under way when ranks part in peace

_failed: list[object] = []  # memory on devices that have failed: giving it back would end the process


def takes(dtype: torch.dtype, size: int) -> bool:
    """Whether a tensor of so many bytes is summed here, rather than by NCCL: the same on all ranks."""
    return dtype in NUMBER_FORMATS and 0 < size <= LARGEST and size % WORD == 0


def what_fails(stages: Iterable[Callable[[], None]], least: Callable[[int], int]) -> str | None:
    """Go through stages together with the other ranks, as far as all of them come.

    Args:
        least: the least of the ranks' numbers.

    Returns:
        Why a stage failed, here or elsewhere; None if none did on any rank.
    """
    for stage in stages:
        why = None
        try:
            stage()
        except Exception as error:  # whatever it is, there is another way to add up
            why = in_one_sentence(error)
        if not least(int(why is None)):
            return why or "another rank cannot"
    return None


def let_go(pads: Sequence[Tensor], rank: int) -> None:
    """Give a rank's kernel the signals that it waits for, of one wait.

    A kernel puts 1 into its word of another rank's pad when that is 0, and takes 1 from the other's word of its own pad. Its
    word of its own pad it puts and takes by itself.

    Args:
        pads: of all ranks, each [block, rank that signals], int32.
    """
    for other, pad in enumerate(pads):
        if other != rank:
            pad[:, rank].fill_(0)
            pads[rank][:, other].fill_(1)


def near_sums(share: Share, store: Any, port: int, device: torch.device, least: Callable[[int], int]) -> NearSums | None:
    """What adds up small tensors, or None where a rank cannot; all ranks have to call it, and come to the same.

    Args:
        store: through which ranks find each other.
        port: of that store, by which a process tells its engines apart.
        least: the least of the ranks' numbers.
    """
    sums = NearSums(share, dist.PrefixStore("near", store), f"specontext-{port}", device)
    with torch.inference_mode(False):
        why = what_fails((sums.look, sums.allocate, sums.meet, sums.prepare, sums.rehearse), least)
    if why is None:
        return sums
    logger.info("the GPUs add up through NCCL alone, not by reading each other's memory: %s", why)
    sums.close()
    return None


class NearSums:
    """This rank's side of sums in the ranks' memory; its first five methods are called in their order, by all ranks."""

    def __init__(self, share: Share, store: Any, name: str, device: torch.device) -> None:
        self._share, self._store, self._name = share, store, name
        self._device = device
        self._sum: Any = None
        self._buffer: Any = None
        self._group: Any = None
        self._pads: list[Tensor] = []
        self._side: Any = None
        self._piece: Any = None
        self._thread: threading.Thread | None = None
        self._enough = threading.Event()
        self._lock = threading.Lock()

    def look(self) -> None:
        """Whether this device reaches the others at all."""
        own = self._device.index
        self._store.set(str(self._share.rank), str(own))
        others = [int(self._store.get(str(rank))) for rank in range(self._share.size) if rank != self._share.rank]
        # Nobody needs multicast here, and an object of it that is left behind keeps it from all others on the machine.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._sum = torch.ops.symm_mem.one_shot_all_reduce_out.default
        for other in others:
            if other == own or not torch.cuda.can_device_access_peer(own, other):
                raise RuntimeError(f"GPU {own} has no direct access to GPU {other}")

    def allocate(self) -> None:
        """Memory that the others can map."""
        self._buffer = c10d._SymmetricMemory.empty_strided_p2p((LARGEST,), (1,), torch.uint8, self._device)

    def meet(self) -> None:
        """Map the others' memory."""
        rank, size = self._share.rank, self._share.size
        self._group = dist.ProcessGroup(self._store, rank, size)
        self._group._set_group_name(self._name)
        c10d._register_process_group(self._name, self._group)
        memory = c10d._SymmetricMemory
        try:
            handle = memory.rendezvous(self._buffer, self._name)
        except RuntimeError as error:
            if "no group info" not in str(error):
                raise
            memory.set_group_info(self._name, rank, size, self._store)  # older versions of PyTorch know groups by this alone
            handle = memory.rendezvous(self._buffer, self._name)
        self._pads = [handle.get_signal_pad(one, (BLOCKS, size), torch.int32) for one in range(size)]

    def prepare(self) -> None:
        """Have ready what lets kernels go: while one waits, nothing can be loaded."""
        # Its launches must not queue behind those of steps, with which streams of the same priority may share a queue.
        self._side = torch.cuda.Stream(self._device, priority=-1)
        self._piece = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._side):
            let_go(self._pads, self._share.rank)
            torch.cuda._sleep(1)
        self._side.synchronize()
        with torch.cuda.graph(self._piece, stream=self._side, capture_error_mode="thread_local"):
            for _ in range(ROUNDS):
                let_go(self._pads, self._share.rank)
                torch.cuda._sleep(PAUSE)
        with torch.cuda.stream(self._side):
            self._piece.replay()
            self._pads[self._share.rank].zero_()
        self._side.synchronize()

    def rehearse(self) -> None:
        """Add up once, and see whether it comes to an end and to the right sum."""
        numbers = torch.full((LARGEST // 4,), float(2**self._share.rank), device=self._device)
        self.sum_(numbers)
        if not self.idle(REHEARSAL_S):
            self.release()
            raise RuntimeError("a sum that was tried did not come to an end")
        if not bool((numbers == 2**self._share.size - 1).all()):
            raise RuntimeError("a sum that was tried came out wrong")

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is summed here: the same on all ranks."""
        return tensor.device == self._device and takes(tensor.dtype, tensor.nbytes)

    @torch.no_grad()
    def sum_(self, tensor: Tensor) -> None:
        """Add up the ranks' tensors, in place, on the stream that computes."""
        shared = self._buffer.view(tensor.dtype)[: tensor.numel()].view(tensor.shape)
        # A copy by a kernel of its own. `one_shot_all_reduce_copy_out` would copy too, but there the first threads of a block
        # signal that there is something to read without waiting for the others to have written it.
        torch.mul(tensor, 1, out=shared)
        fits = tensor.is_contiguous() and tensor.data_ptr() % ALIGNED == 0
        out = tensor if fits else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._sum(shared, "sum", self._name, out)
        if out is not tensor:
            tensor.copy_(out)

    def release(self) -> None:
        """Let go kernels that wait for others, from any thread and for as long as such may be launched; their sums are wrong."""
        with self._lock:
            if self._piece is None or self._thread is not None:
                return
            begun = threading.Event()
            self._thread = threading.Thread(target=self._let_go, args=(self._piece, begun), name="release of sums", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter ends, and starts no more threads
                self._enough.set()
                self._let_go(self._piece, begun)
        begun.wait(GRACE_S)

    def idle(self, seconds: float = GRACE_S) -> bool:
        """Whether this thread's stream has done all that it was given within so many seconds."""
        until = time.monotonic() + seconds
        try:
            stream = torch.cuda.current_stream(self._device)
            while not stream.query():
                if time.monotonic() > until:
                    return False
                time.sleep(0.001)
        except RuntimeError:  # of the device
            return False
        return True

    def close(self) -> None:
        """Give the memory back; nothing may wait any more, and captured steps must be gone."""
        rests = self.idle(RELEASE_S) if self._pads else True
        with self._lock:
            piece, self._piece = self._piece, None
        self._enough.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(GRACE_S)
            rests = rests and not self._thread.is_alive()
        if not rests:
            _failed.append((self._buffer, self._pads, piece))
        elif self._side is not None:
            self._side.synchronize()  # rounds that were queued, at most for a second
        self._pads, self._buffer = [], None
        if self._group is not None:
            c10d._unregister_process_group(self._name)
            self._group = None

    def _let_go(self, piece: Any, begun: threading.Event) -> None:
        """Queue rounds, at least once, until it is enough."""
        until = time.monotonic() + RELEASE_S
        with suppress(RuntimeError), torch.cuda.stream(self._side):  # on a device that has failed nothing waits
            while True:
                for _ in range(PIECES):
                    piece.replay()
                begun.set()
                queued = self._side.record_event()
                while not queued.query() and not self._enough.is_set():
                    time.sleep(0.005)
                if self._enough.is_set() or time.monotonic() > until:
                    break
        begun.set()
