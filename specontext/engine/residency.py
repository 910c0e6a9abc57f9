"""How many layers keep their KV on the device: they leave before memory runs out, last layer first, and return when they can.

Algorithm 2 of the paper, counted in pages and for requests of any lengths. One layer moves at a time, in portions between steps,
and starts early enough to arrive before its pages are needed; only when tokens that are decoded outrun that does a step wait for
it. Who comes, and prompts that grow, wait while others decode: then a layer leaves in larger portions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from specontext.kv.cache import KVCache
from specontext.kv.seats import ParkedKV
from specontext.memory.kv_cost import KVCost
from specontext.memory.planner import ResidencyPolicy
from specontext.memory.tiers import Tier

MARGIN = 3  # steps by which a move is to arrive early; its last rows have one of them to arrive
PIN_STEPS = 256  # before a layer leaves: so early its place on the host begins to be pinned
KEPT_MOVES = 1000


@dataclass(frozen=True)
class Move:
    """One layer's move, as statistics show it.

    Attributes:
        step: engine step before which the layer began to live in the other tier.
        bytes: rows copied.
        stall_s: seconds that steps waited for it on the host.
    """

    step: int
    layer: int
    to_host: bool
    bytes: int
    stall_s: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Residency:
    """Decides and carries out moves between steps.

    Args:
        adaptive: layers may move; else only the counting below is used.
        chunk_bytes: rows that are copied between two steps.
        most_bytes: the same where a request waits for them.

    Attributes:
        steps: that the engine has begun.
        moves: the last of them, `KEPT_MOVES` at most; a server may live long.
        num_moves: all there ever were.
        stalled: seconds that steps have waited for moves, in all.
        awaited: a request waits for the move that is under way.
    """

    def __init__(self, kv: KVCache, cost: KVCost, *, adaptive: bool, chunk_bytes: int, most_bytes: int) -> None:
        self.kv, self.adaptive, self.chunk_bytes, self.most_bytes = kv, adaptive, chunk_bytes, most_bytes
        self.cost = cost
        self.steps = 0
        self.moves: deque[Move] = deque(maxlen=KEPT_MOVES)
        self.num_moves = 0
        self.stalled = 0.0
        self._copied = False  # all its rows are on their way
        self.awaited = False
        self._stall = 0.0

    def forget(self) -> None:
        """Count anew."""
        self.steps = self.num_moves = 0
        self.moves.clear()
        self.stalled = 0.0

    def moves_since(self, count: int) -> list[Move]:
        """Moves after the first `count`, as far as they are kept."""
        new = min(self.num_moves - count, len(self.moves))
        return list(self.moves)[len(self.moves) - new :]

    # What fits --------------------------------------------------------------------------------------------------------

    def policy(self, requests: int, *, but: ParkedKV | None = None) -> ResidencyPolicy:
        """The rule that says how many layers must leave, with the pages that so many requests can have.

        Args:
            but: parked KV that is asked about, so that what it holds on the host is not counted twice.
        """
        return self._policy(requests, sum(parked.num_pages for parked in self.kv.parked if parked is not but))

    def _policy(self, requests: int, parked: int) -> ResidencyPolicy:
        """The same where waiting requests hold `parked` pages of the host."""
        arena, host = self.kv.arena, self.kv.host
        # Pages of keys hold more tokens than those of KV: of each request one may be emptier than the rule counts.
        kept = arena.page_bytes * (1 + (requests if self.cost.common_token else 0))
        return ResidencyPolicy(self.cost, arena.num_bytes - kept, host.num_bytes - parked * host.page_bytes)

    @property
    def _numbers(self) -> Sequence[int]:
        """How many layers may be offloaded: as many as now or, where layers move, any number."""
        return range(self.cost.layers + 1) if self.adaptive else [len(self.kv.offloaded)]

    def fits_somehow(self, lengths: Sequence[int], *, but: ParkedKV | None = None) -> bool:
        """Whether requests of these lengths fit into both tiers, with as many layers offloaded as now or, where layers move, with
        any number."""
        policy = self.policy(len(lengths), but=but)
        tokens = policy.tokens_after(lengths, 0)
        return any(policy.fits(number, tokens, len(lengths)) for number in self._numbers)

    def fits_now(self, lengths: Sequence[int], *, but: ParkedKV | None = None) -> bool:
        """Whether requests of these lengths fit with the layers where they are."""
        policy = self.policy(len(lengths), but=but)
        return policy.fits(len(self.kv.offloaded), policy.tokens_after(lengths, 0), len(lengths))

    def fewest_away(self, lengths: Sequence[int], *, but: ParkedKV | None = None) -> int | None:
        """The fewest layers that must be offloaded for requests of these lengths; None where they do not fit."""
        policy = self.policy(len(lengths), but=but)
        tokens = policy.tokens_after(lengths, 0)
        return next((number for number in self._numbers if policy.fits(number, tokens, len(lengths))), None)

    def lack(self, length: int) -> str | None:
        """Which tier a request of so many tokens could not run in even alone, and what would help; None where it could."""
        policy = self._policy(1, parked=0)
        tokens, available = policy.tokens_after([length], 0), policy.host_available or 0
        lacking = [
            (max(0, self.cost.device(tokens, 1, n) - policy.available), max(0, self.cost.host(tokens, n) - available))
            for n in self._numbers
        ]
        if (0, 0) in lacking:
            return None
        # What either tier lacks where the other has enough; where neither has, they lack it both.
        on_device = min((device for device, host in lacking if not host), default=0)
        on_host = min((host for device, host in lacking if not device), default=0)
        link = "or"
        if not on_device and not on_host:
            (on_device, on_host), link = min(lacking, key=sum), "and"
        found = ((self.kv.arena, on_device, "gpu_memory"), (self.kv.host, on_host, "host_memory"))
        short = [(pool, -(-more // pool.page_bytes) * pool.page_bytes, setting) for pool, more, setting in found if more]
        lacks = f" {link} ".join(
            f"{more} bytes more than the {pool.num_bytes} of the {pool.pages.name}" for pool, more, _ in short
        )
        settings = f" {link} ".join(setting for *_, setting in short)
        return f"a request of {length} tokens needs {lacks}: raise {settings} by that, lower max_tokens, or shorten the prompt"

    # Moving -----------------------------------------------------------------------------------------------------------

    def advance(
        self, stored: Mapping[int, int], lengths_in: Callable[[int], list[int]], leaving_pays: Callable[[], bool] = lambda: True
    ) -> None:
        """Between two steps: go on with a move, or begin one that will be needed, or that has become possible.

        Args:
            stored: tokens stored, by seat.
            lengths_in: how long requests will be in so many steps.
            leaving_pays: whether layers may leave; asked where one would begin to.
        """
        if self.adaptive:
            self._go_on(stored, lengths_in, leaving_pays)

    def _go_on(self, stored: Mapping[int, int], lengths_in: Callable[[int], list[int]], leaving_pays: Callable[[], bool]) -> None:
        began = time.perf_counter()
        if self.kv.move is None:
            self.pin_ahead(lengths_in)
            self._begin(stored, lengths_in, leaving_pays)
        if self.kv.move is None:
            return
        # The last rows have had the time of a step to arrive, and none waits for them.
        arrived = self._copied and self.kv.room_after_move >= 0
        if not arrived:
            self.kv.advance_move(stored, self.most_bytes if self.awaited else self.chunk_bytes, patient=True)
            self._copied = self.kv.move_is_copied(stored)
        self._stall += time.perf_counter() - began
        if arrived:
            self._finish(stored)

    def pin_ahead(self, lengths_in: Callable[[int], list[int]]) -> bool:
        """Have host memory pinned meanwhile for a layer that will leave soon; whether nothing is missing.

        Pages are pinned as they are taken, and a move takes a whole layer's at once: it would wait for them.
        """
        host, memory = self.kv.host, self.kv.host.memory
        if memory is None or memory.ready_bytes == memory.num_bytes or self.kv.next_to_leave is None:
            return True
        soon = lengths_in(PIN_STEPS)
        policy = self.policy(len(soon))
        tokens = policy.tokens_after(soon, 0)
        if policy.fits(len(self.kv.offloaded), tokens, len(soon)):
            return True
        away = len(self.kv.offloaded)
        more = self.cost.host_layers(away + 1) - self.cost.host_layers(away)  # none where others of its block are there
        end = (host.pages.num_held + 1) * host.page_bytes + tokens * more * self.cost.host_token
        if memory.ready_bytes >= min(end, memory.num_bytes):
            return True
        memory.reach(memory.ready_bytes)  # does not wait: what is pinned ahead counts from here
        return False

    def wanted(self, stored: Mapping[int, int], lengths_in: Callable[[int], list[int]]) -> int:
        """How many layers should be offloaded by the time that a move which begins now has arrived; arguments as in `step`."""
        token_bytes = self.kv.layout.layers[0].entry_bytes
        soon = lengths_in(-(-sum(stored.values()) * token_bytes // self.chunk_bytes) + MARGIN)
        policy = self.policy(len(soon))
        target = policy.target(len(self.kv.offloaded), policy.tokens_after(soon, 0), len(soon))
        # Where nothing fits, layers leave as long as they can; then requests wait.
        return self.cost.layers if target is None else target

    def _begin(self, stored: Mapping[int, int], lengths_in: Callable[[int], list[int]], leaving_pays: Callable[[], bool]) -> None:
        now, target = len(self.kv.offloaded), self.wanted(stored, lengths_in)
        # Where the other tier is full nothing moves: requests wait, or are preempted.
        if target > now:
            if self.kv.next_to_leave is not None and leaving_pays():
                self.kv.begin_move(self.kv.next_to_leave, to_host=True)
        elif target < now:
            self.kv.begin_move(min(self.kv.offloaded), to_host=False)

    def rehearse(self, stored: Mapping[int, int]) -> None:
        """Have the last layer leave and come back at once, as far as there is room, so that what runs then is compiled."""
        layer = self.kv.next_to_leave
        if not self.adaptive or self.kv.move is not None or layer is None:
            return
        for to_host in (True, False):
            if not self.kv.begin_move(layer, to_host=to_host):
                return
            if not self.kv.finish_move(stored):
                self.kv.cancel_move()
                return

    def give_way(self) -> bool:
        """Have a layer leave the device in portions, since a request that need not run now waits for it; False where none can,
        or where that frees nothing."""
        kv = self.kv
        if not self.adaptive:
            return False
        if kv.move is not None and not kv.move.to_host:
            self._drop_move()
        begun = kv.move is not None
        if not begun and (kv.next_to_leave is None or not kv.begin_move(kv.next_to_leave, to_host=True)):
            return False
        if kv.room_after_move <= kv.arena.pages.num_free:
            if not begun:
                self._drop_move()
            return False
        self.awaited = True
        return True

    def make_room(self, stored: Mapping[int, int], tier: Tier) -> bool:
        """Take one layer off the device at once, or the layers of a block off the host, because a step needs their pages; False
        when that frees none."""
        if not self.adaptive:
            return False
        began, kv, to_host = time.perf_counter(), self.kv, tier is Tier.DEVICE
        if kv.move is not None and kv.move.to_host != to_host:  # it goes where there is no room
            self._drop_move()
            return True
        begun = kv.move is not None
        if not begun:
            # Layers of a block share its pages: the first comes back only where the device has room for them all.
            layers = kv.next_block_to_return if not to_host else [] if kv.next_to_leave is None else [kv.next_to_leave]
            if not layers or (not to_host and not kv.fits_on_device(len(layers))):
                return False
            if not kv.begin_move(layers[0], to_host=to_host):
                return False
        if to_host and kv.room_after_move <= kv.arena.pages.num_free:  # the next layer's slots take what it leaves
            if not begun:
                self._drop_move()
            return False
        self._stall += time.perf_counter() - began
        self._finish(stored)
        return True

    def settle(self, lengths: Sequence[int], *, but: ParkedKV | None = None) -> None:
        """While no request has a seat, let layers live where requests of these lengths fit: nothing has to be copied."""
        if not self.adaptive or self.kv.seats:
            return
        if self.kv.move is not None:
            self._drop_move()
        policy = self.policy(len(lengths), but=but)
        target = policy.target(len(self.kv.offloaded), policy.tokens_after(lengths, 0), len(lengths))
        while target is not None and target != len(self.kv.offloaded):
            leaving = target > len(self.kv.offloaded)
            layer = self.kv.next_to_leave if leaving else min(self.kv.offloaded)
            assert layer is not None
            self.kv.begin_move(layer, to_host=leaving)
            self._finish({})

    def _drop_move(self) -> None:
        self.kv.cancel_move()
        self.stalled += self._stall
        self._copied, self.awaited, self._stall = False, False, 0.0

    def _finish(self, stored: Mapping[int, int]) -> None:
        began, move = time.perf_counter(), self.kv.move
        assert move is not None
        arrived = self.kv.finish_move(stored)
        assert arrived, "a layer arrives where there is room for what it needs"
        self._copied = self.awaited = False
        stall = self._stall + time.perf_counter() - began
        self.num_moves += 1
        self.moves.append(Move(self.steps + 1, move.layer, move.to_host, move.bytes, stall))
        self.stalled += stall
        self._stall = 0.0
