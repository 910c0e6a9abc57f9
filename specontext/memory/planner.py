"""Before inference: thresholds and longest contexts (Algorithm 1). During inference: how many layers to offload (Algorithm 2).

Nothing here knows the engine: numbers of tokens and requests go in, a number of layers comes out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from specontext.errors import MemoryPlanError
from specontext.memory.facts import ModelFacts
from specontext.memory.kv_cost import KVCost
from specontext.memory.model import MemoryModel

GIB = 1 << 30
STAY = 256  # tokens
UNBOUNDED = 1 << 62  # tokens, where they take nothing on the device: no head keys, and all layers offloaded


def thresholds(kv: KVCost, available: int, requests: int) -> tuple[int, ...]:
    """Algorithm 1: ST_0 .. ST_L, the longest context of `requests` equal requests with i layers offloaded.

        ST_i = floor((Mem - 1.3 (M_O + M_D) - 4 i B R H D) / (4 R H D (L + 1 + alpha - i)))

    in mode `paper`; in other modes the same with their coefficients, in whole pages.

    Args:
        available: device bytes for KV, what is left of Mem beside the fixed parts; may be negative.

    Returns:
        L + 1 integers in tokens; -1 where not even a context of 0 tokens fits, UNBOUNDED where tokens take nothing.
    """
    found = []
    for offloaded in range(kv.layers + 1):
        room = available - kv.slots(requests, offloaded)
        page = requests * kv.page_size * kv.token(offloaded)
        found.append(-1 if room < 0 else room // page * kv.page_size if page else UNBOUNDED)
    return tuple(found)


@dataclass(frozen=True)
class ResidencyPolicy:
    """Algorithm 2 for requests of any lengths: how many layers, the last ones first, have their KV on the host.

    The paper's rule for R requests of S tokens is: while S >= ST[i], offload one layer more. S >= ST[i] says that the token
    which the coming step adds to each request no longer fits with i layers offloaded, and this is what is asked here, of the
    sum of all tokens after that step.

    A layer returns only where every request could then grow by `stay` tokens more. So while the sum of tokens moves within
    `stay` tokens a request, all moves go in one direction.

    The policy keeps no state. Moving takes time: ask with the lengths of a later step (`tokens_after`, `growth`) to start early.

    Attributes:
        available: device bytes for KV.
        host_available: host bytes for KV, None for no limit.
    """

    kv: KVCost
    available: int
    host_available: int | None = None
    stay: int = STAY

    def tokens_after(self, lengths: Iterable[int], growth: int = 1) -> int:
        """What to ask with: tokens of requests of these lengths in whole pages, once each has grown by `growth` tokens."""
        return sum(self.kv.whole_pages(length + growth) for length in lengths)

    def fits(self, offloaded: int, tokens: int, requests: int) -> bool:
        """Whether both tiers hold so many tokens with this many layers offloaded."""
        on_device = self.kv.device(tokens, requests, offloaded) <= self.available
        return on_device and (self.host_available is None or self.kv.host(tokens, offloaded) <= self.host_available)

    def capacity(self, offloaded: int, requests: int) -> int:
        """The most tokens, summed over requests, that fit with this many layers offloaded; -1 if not even none fit."""
        room = self.available - self.kv.slots(requests, offloaded)
        token = self.kv.token(offloaded)
        most = room // token if token else UNBOUNDED
        if self.host_available is not None and offloaded:
            room = min(room, self.host_available - self.kv.host_fixed)
            most = min(most, (self.host_available - self.kv.host_fixed) // (self.kv.host_layers(offloaded) * self.kv.host_token))
        return -1 if room < 0 else most // self.kv.page_size * self.kv.page_size

    def target(self, offloaded: int, tokens: int, requests: int) -> int | None:
        """How many layers should be offloaded now.

        Args:
            offloaded: how many are.
            tokens: tokens of all running requests in whole pages, once the coming step is stored (`tokens_after`).
            requests: number of running requests; each has slots in every offloaded layer.

        Returns:
            0 .. L, as few moves away as the memory demands; None where no number of layers fits and requests must leave.
        """
        layers, later = self.kv.layers, tokens + self.stay * requests
        for fewer in range(offloaded):
            if self.fits(fewer, later, requests):
                return fewer
        # Where slots take more than the tokens they stand for, it is a smaller number that fits.
        for number in (*range(offloaded, layers + 1), *range(offloaded - 1, -1, -1)):
            if self.fits(number, tokens, requests):
                return number
        return None


@dataclass(frozen=True)
class MemoryPlan:
    """What fits for `requests` requests of equal length.

    Attributes:
        gpu_memory, host_memory: bytes; None for a host without limit.
        max_model_len: longest context that is asked for.
    """

    facts: ModelFacts
    model: MemoryModel
    requests: int
    gpu_memory: int
    host_memory: int | None
    max_model_len: int

    @property
    def layers(self) -> int:
        return self.model.kv.layers

    @property
    def available(self) -> int:
        """Device bytes that are left for KV; negative where the fixed parts alone are too much."""
        return self.gpu_memory - self.model.fixed_bytes

    @cached_property
    def thresholds(self) -> tuple[int, ...]:
        """ST_0 .. ST_L."""
        return thresholds(self.model.kv, self.available, self.requests)

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """Longest context with 0 .. L layers offloaded that device and host both hold, -1 where none."""
        policy = self.policy()
        pages = self.model.kv.page_size
        most = [policy.capacity(i, self.requests) for i in range(self.layers + 1)]
        return tuple(-1 if tokens < 0 else tokens // (self.requests * pages) * pages for tokens in most)

    @property
    def max_len_resident(self) -> int:
        """Longest context with the KV of all layers on the device, whatever the model's own maximum."""
        return max(self.thresholds[0], 0)

    @property
    def max_len_device(self) -> int:
        """Longest context that the device allows with any number of layers offloaded."""
        return max(*self.thresholds, 0)

    @property
    def max_len_offloaded(self) -> int:
        """Longest context with any number of layers offloaded that device and host allow."""
        return max(*self.reach, 0)

    @property
    def max_len(self) -> int:
        """Longest context that can be served: memory and `max_model_len` allow it."""
        return min(self.max_len_offloaded, self.max_model_len)

    @property
    def limited_by(self) -> str:
        """What ends longer contexts: `model` (or what was asked for), `gpu_memory` or `host_memory`."""
        if self.max_len == self.max_model_len:
            return "model"
        return "host_memory" if self.max_len_device > self.max_len_offloaded else "gpu_memory"

    def offloaded_at(self, length: int) -> int | None:
        """The fewest layers to offload for contexts of this length; None where it does not fit."""
        return next((i for i, most in enumerate(self.reach) if most >= length), None)

    def bytes_at(self, length: int) -> dict[str, int]:
        """Bytes by part at a length, with all layers offloaded where it does not fit."""
        offloaded = self.offloaded_at(length)
        return self.model.by_part(length, self.requests, self.layers if offloaded is None else offloaded)

    def policy(self, stay: int = STAY) -> ResidencyPolicy:
        """The run-time rule with the memory of this plan."""
        return ResidencyPolicy(self.model.kv, self.available, self.host_memory, stay)

    def check_weights(self) -> None:
        """Raises MemoryPlanError, saying by how much, where the weights alone exceed the device's memory."""
        weights, head = self.model.fixed["weights"], self.model.fixed["retrieval_head"]
        missing = weights + head - self.gpu_memory
        if missing > 0:
            raise MemoryPlanError(
                f"{self.facts.name} does not fit: its weights take {_size(weights)} and its retrieval head {_size(head)}, "
                f"and the GPU memory is {_size(self.gpu_memory)}, {_size(missing)} too little: give at least "
                f"{_size(self.model.fixed_bytes)} (--gpu-memory), or take a smaller model or number format"
            )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 100 else f"{count:,} bytes"
