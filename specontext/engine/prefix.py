"""Prompts that begin like earlier ones start from what is known of their pages.

Only full pages that were computed densely are kept, so what a request reads never depends on what others asked before it. A
request that arrives while another one computes the same pages waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor

from specontext.core import Batch, Request, Segment
from specontext.engine.methods import Methods
from specontext.kv.block_state import State
from specontext.kv.cache import KVCache
from specontext.kv.prefix_tree import Block, page_of
from specontext.retrieval.selector import PageState

WORTH_A_STEP = 128  # tokens that others may find, for which a chunk ends early and another step is needed


@dataclass(eq=False)
class _Growing:
    """A prompt that is being computed and whose pages are kept as they are completed.

    Attributes:
        chain: blocks of all pages so far.
    """

    request: Request
    chain: list[Block] = field(default_factory=list)


def block_state(methods: Methods, page_size: int) -> tuple[int, int]:
    """Numbers that are kept of each page of a known prompt, and of its last token, besides KV."""
    return (0, 0) if methods.shared is None else methods.shared.page_numbers(page_size)


class PrefixCache:
    """What requests know of each other's prompts.

    Args:
        enabled: else nothing is kept and nothing found.

    Attributes:
        queries, hits: tokens of prompts that could have been found, and tokens that were, since the start; not of what is
            computed again after a preemption, nor for further outputs of a prompt, which find their own.
    """

    def __init__(self, kv: KVCache, methods: Methods, *, enabled: bool) -> None:
        self.kv, self.tree, self.methods, self.enabled = kv, kv.blocks.tree, methods, enabled
        self.queries = self.hits = 0
        self._growing: dict[int, _Growing] = {}  # by seat

    @property
    def pages(self) -> int:
        """Pages of the host's pool that are kept."""
        return self.tree.num_pages

    # Finding ----------------------------------------------------------------------------------------------------------

    def _usable(self, request: Request) -> int:
        """Pages that a request that begins does not have to compute itself, if they are known."""
        if not self.enabled:
            return 0
        replay = self.methods.replay(request.choice)
        if replay is None:
            return 0
        tokens = request.prefill_length - max(1, replay)
        if request.prompt_logprobs is not None:  # they come from the steps that compute the prompt
            tokens = min(tokens, len(request.prompt_logprobs) - 1)
        return max(0, tokens) // self.kv.page_size

    def awaited(self, request: Request) -> bool:
        """Whether a request that begins would find a page more if it waited for one that is being computed now."""
        usable = self._usable(request) if self._growing else 0
        chain = self.tree.find(request.token_ids, usable)
        if self.kv.states is not None:
            return self._awaits_states(request, usable, self.kv.blocks.usable(chain))
        known = len(chain)
        if known == usable:
            return False
        stop = (known + 1) * self.kv.page_size
        beginning = request.token_ids[:stop]
        others = [growing for growing in self._growing.values() if growing.request.prefill_length >= stop]
        return any(self._alive(growing) and growing.request.token_ids[:stop] == beginning for growing in others)

    def _awaits_states(self, request: Request, usable: int, known: int) -> bool:
        """The same where layers keep states, which are kept behind the last whole page of a prompt."""
        for growing in self._growing.values():
            stop = self._last_page_end(growing.request)
            ahead = growing.request.computed < stop and self._alive(growing)
            of_use = max(WORTH_A_STEP, known * self.kv.page_size + 1) <= stop <= usable * self.kv.page_size
            if ahead and of_use and growing.request.token_ids[:stop] == request.token_ids[:stop]:
                return True
        return False

    def _last_page_end(self, request: Request) -> int:
        """Tokens of a prompt's whole pages but for its last token, which has to be computed in any case."""
        return (request.prefill_length - 1) // self.kv.page_size * self.kv.page_size

    def chunk(self, request: Request, length: int) -> int:
        """Tokens of a request's next chunk, at most `length`: where layers keep states, one ends with the last whole page."""
        stop = self._last_page_end(request)
        ends = request.seat in self._growing and stop >= WORTH_A_STEP and request.computed < stop < request.computed + length
        return stop - request.computed if ends else length

    def _alive(self, growing: _Growing) -> bool:
        return not growing.chain or growing.chain[-1] in self.tree

    def find(self, request: Request, ahead: int) -> list[Block]:
        """The blocks from which a request that begins goes on, so many that the host has room for its seat beside them.

        Args:
            ahead: tokens behind them for which the seat is to have room.
        """
        chain = self.tree.find(request.token_ids, self._usable(request))
        del chain[self.kv.blocks.usable(chain) :]
        alone = list(accumulate(map(self.tree.num_alone_of, chain)))  # pages that count as free, and the seat cannot have
        while chain:
            length = min(request.prefill_length, self.tokens(chain) + ahead)
            if self.kv.host_pages_for(length, len(chain)) <= self.kv.host.pages.num_free - alone[len(chain) - 1]:
                break
            chain.pop()
            del chain[self.kv.blocks.usable(chain) :]
        return chain

    def tokens(self, chain: Sequence[Block]) -> int:
        """Tokens of a chain."""
        return len(chain) * self.kv.page_size

    def using(self, chain: Sequence[Block]) -> AbstractContextManager[None]:
        """Inside, none of these blocks is dropped."""
        return self.tree.using(chain)

    # Requests ---------------------------------------------------------------------------------------------------------

    def fill(self, request: Request, seat: int, chain: Sequence[Block]) -> None:
        """Put what is known into the seat of a request that begins."""
        if chain:
            state = self.kv.bring(chain, seat)
            if self.methods.shared is not None:
                self.methods.shared.restore_pages(seat, self.tokens(chain), PageState(state.each, state.last))
        request.computed = self.tokens(chain)
        if request.cached_tokens is not None:
            return
        request.cached_tokens = request.computed
        if request.index == 0 and self._usable(request):
            self.queries += request.prefill_length
            self.hits += request.computed

    def follow(self, request: Request, seat: int) -> None:
        """Keep the pages of a request's prompt from now on, as they are completed."""
        if self.enabled and not request.decoding:
            chain = self.tree.find(request.token_ids, request.computed // self.kv.page_size)
            if len(chain) == request.computed // self.kv.page_size:  # else features of pages in between are unknown
                self._growing[seat] = _Growing(request, chain)
                self._follow_rings()
                self.kv.expect_blocks(
                    {
                        seat: (one.request.prefill_length, one.request.prefill_length // self.kv.page_size - len(one.chain))
                        for seat, one in self._growing.items()
                    }
                )

    def leave(self, seat: int) -> None:
        """A request leaves its seat."""
        self._growing.pop(seat, None)
        self._follow_rings()

    def _follow_rings(self) -> None:
        """Layers with a window keep what known pages need of them."""
        if self.kv.rings is not None:
            self.kv.rings.followed = set(self._growing)

    def observe(self, batch: Batch, features: Tensor | None) -> None:
        """Keep the pages that the chunks of a step have completed, after the forward pass.

        Args:
            features: [T, F * H], where the retrieval head sees any.
        """
        for segment in batch.prefills:
            growing = self._growing.get(segment.seat)
            if growing is None:
                continue
            wanted = (segment.start + segment.length) // self.kv.page_size
            if self._alive(growing):
                self._keep(growing, segment, wanted, features)
            if len(growing.chain) < wanted or segment.start + segment.length >= growing.request.prefill_length:
                del self._growing[segment.seat]
        self._follow_rings()

    def _keep(self, growing: _Growing, segment: Segment, wanted: int, features: Tensor | None) -> None:
        chain, size, tree = growing.chain, self.kv.page_size, self.tree
        pages = [page_of(growing.request.token_ids, page, size) for page in range(len(chain), wanted)]
        while pages and (known := tree.after(chain[-1] if chain else None, pages[0])) is not None:
            chain.append(known)  # another request has been faster
            pages.pop(0)
        stored = segment.start + segment.length
        if pages:
            self.kv.keep(chain, pages, segment.seat, self._state(segment, len(chain), wanted, features), stored)
        else:
            self.kv.blocks.keep_rings(chain, segment.seat, stored)
        self.kv.blocks.keep_states(chain, segment.seat, stored)

    def _state(self, segment: Segment, first: int, stop: int, features: Tensor | None) -> State:
        """State of the pages first .. stop - 1 of a seat, the last tokens of which are in a chunk."""
        if self.methods.shared is None:
            none = self.kv.arena.rows.new_empty((stop - first, 0))
            return State(none, none)
        known = self.methods.shared.page_state(segment, first, stop, self.kv.page_size, features)
        return State(known.each, known.last)

    def reset(self) -> None:
        """Drop all that is kept."""
        self._growing.clear()
        self.kv.host.pages.free(self.tree.give_up_all())

    def forget(self) -> None:
        """Drop all that is kept, and count anew."""
        self.reset()
        self.queries = self.hits = 0

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raises AssertionError when blocks contradict each other or the requests that they are kept from."""
        self.tree.check_integrity()
        seats = {request.seat: request for request in running}
        for seat, growing in self._growing.items():
            request = growing.request
            assert seats.get(seat) is request and len(growing.chain) == request.computed // self.kv.page_size
            if self._alive(growing):
                tokens = [token for block in growing.chain for token in block.tokens]
                assert tokens == request.token_ids[: len(tokens)]
