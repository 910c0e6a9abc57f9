"""The selection methods of an engine: its own and those that requests may name, and the state each request has in them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specontext.core import Choice
from specontext.errors import RequestError, shown
from specontext.kv.layout import Layout, Reader
from specontext.retrieval.registry import FULL, base_of, needs_head
from specontext.retrieval.selector import Budget, LayerSelector, PromptWatcher, Selector, reads_everything


class Methods:
    """Selectors by name, and by the choice of a request.

    Variants of a method share its state. Where the engine has a retrieval head, every request has keys in it, whatever it chose:
    so what is known of a prefix serves all.

    Args:
        own: what requests get that choose nothing.
        budget: the engine's; no request may have a larger one.
        selectors: by name of the method, made for this budget.
        layout: of the KV that they choose from.
        heads: the KV heads that are here, where other ranks have the others; some methods know of no others.

    Attributes:
        shared: the method whose state every request has, so that what is known of a prefix serves all; None without a head.
        own_way: the selector of requests that choose nothing, and how they read what it selects.
        observers: the methods that see the tokens of every step after the forward pass.
    """

    def __init__(
        self,
        own: str,
        budget: Budget,
        selectors: Mapping[str, Selector],
        *,
        layout: Layout,
        device: torch.device,
        heads: slice = slice(None),
    ) -> None:
        self.selectors, self.budget = dict(selectors), budget
        self.own = Choice(own, 0 if reads_everything(selectors[own]) else budget.total)
        self.selector = selectors[own]
        headed = [
            name for name, one in selectors.items() if base_of(name) == name and needs_head(name) and not reads_everything(one)
        ]
        self.shared = selectors[headed[0]] if headed else None
        self._headed = headed
        self.readers = {
            name: Reader.of_map(layout, _own_map(one, layout, heads), device, in_layer=isinstance(one, LayerSelector))
            for name, one in selectors.items()
        }
        self.own_way = self.selector, self.readers[own]
        # Variants share their method's state.
        self._with_state = list(dict.fromkeys(one for name, one in selectors.items() if base_of(name) == name))
        self.observers = [one for one in self._with_state if type(one).observe is not Selector.observe]
        self._made: dict[Choice, Selector] = {self.own: self.selector}
        self._states: dict[int, list[Selector]] = {}  # those with state of an open seat, the one it chose last

    def choose(self, method: str | None, budget: int | None) -> Choice | None:
        """The choice of a request that names a method or a budget; None for the engine's own way.

        Raises:
            RequestError: the engine does not run this method, or not with this budget.
        """
        name = method if method is not None else self.own.method
        if name not in self.selectors:
            known = ", ".join(sorted(self.selectors))
            raise RequestError(f"method {shown(name)} is none that this engine runs ({known}): start it with it among --methods")
        if reads_everything(self.selectors[name]):
            means_full = name != FULL and self.selectors[name] is self.selectors.get(FULL)  # where nothing can be chosen
            if budget is not None and not means_full:
                raise RequestError(f"budget {budget} was given and method '{name}' reads everything: leave it out")
            choice = Choice(name, 0)
        else:
            least, most = self.budget.sink + self.budget.recent + 1, self.budget.total
            if budget is not None and not least <= budget <= most:
                raise RequestError(f"budget must be between {least} (sink + recent + 1) and the engine's {most}, got {budget}")
            choice = Choice(name, most if budget is None else budget)
        return None if choice == self.own else choice

    def choices(self) -> list[Choice | None]:
        """The engine's own way, and every method that requests may name, with the engine's budget."""
        return [None, *(choice for name in self.selectors if (choice := self.choose(name, None)) is not None)]

    def of(self, choice: Choice | None) -> Selector:
        """The selector that serves a choice."""
        choice = choice or self.own
        if choice not in self._made:
            budget = Budget(choice.budget or self.budget.total, self.budget.sink, self.budget.recent)
            self._made[choice] = self.selectors[choice.method].with_budget(budget)
        return self._made[choice]

    def way(self, choice: Choice | None) -> tuple[Selector, Reader]:
        """The selector that serves a choice, and how what it selects is read."""
        return self.of(choice), self.reader(choice)

    def reader(self, choice: Choice | None) -> Reader:
        """How a request with this choice reads what is selected for it."""
        return self.readers[(choice or self.own).method]

    def replay(self, choice: Choice | None) -> int | None:
        """Last tokens of a prompt that a choice's method must see itself, although they are known; None for all of them.

        What is known of a prompt is KV and the state of the shared method, and not that of others with a retrieval head.
        """
        name = base_of((choice or self.own).method)
        return None if name in self._headed[1:] else self.of(choice).replay

    @property
    def num_headed(self) -> int:
        """Methods with a retrieval head, each of which keeps keys of its own."""
        return len(self._headed)

    # State of the requests --------------------------------------------------------------------------------------------

    def open(self, seat: int, tokens: int, choice: Choice | None) -> bool:
        """A request takes a seat, with room for its first `tokens` tokens; False where there is none, and nothing is taken."""
        names = [base_of((choice or self.own).method)]
        if self._headed and self._headed[0] not in names:
            names.insert(0, self._headed[0])
        states = [self.selectors[name] for name in names]
        for number, selector in enumerate(states):
            if not selector.open(seat, tokens):
                for opened in states[:number]:
                    opened.close(seat)
                return False
        self._states[seat] = states
        return True

    def grow(self, seat: int, tokens: int) -> bool:
        """Make room for `tokens` tokens of a request; False where the device has none, and nothing is taken."""
        return all(selector.grow(seat, tokens) for selector in self._states[seat])

    def room(self, seat: int) -> int:
        """Tokens for which an open seat has room."""
        return min(selector.room(seat) for selector in self._states[seat])

    def close(self, seat: int) -> None:
        """The request leaves its seat."""
        for selector in self._states[seat]:
            selector.close(seat)
        del self._states[seat]

    def save(self, seat: int, tokens: int) -> list[object]:
        """The state of a request of `tokens` tokens that has to leave its seat, in host memory."""
        return [selector.save(seat, tokens) for selector in self._states[seat]]

    def restore(self, seat: int, tokens: int, state: list[object]) -> None:
        """Put saved state into a seat that was opened with the same choice."""
        for selector, part in zip(self._states[seat], state, strict=True):
            selector.restore(seat, tokens, part)

    def watcher(self, seat: int) -> PromptWatcher | None:
        """The method of a seat, where it wants to see the queries of its prompt; padding has none."""
        states = self._states.get(seat)
        return states[-1] if states is not None and isinstance(states[-1], PromptWatcher) else None

    @property
    def held_pages(self) -> list[list[int]]:
        """Pages of the device's arena that states lie in."""
        return [pages for one in self._with_state for pages in one.held_pages]


def _own_map(selector: Selector, layout: Layout, heads: slice) -> Tensor:
    """The head map [L, Hkv] of the KV heads that are here, of a method that knows all of them or only these."""
    return selector.head_map if selector.head_map.shape[1] == layout.heads else selector.head_map[:, heads]
