"""Answers that later requests may go on from, in memory, the latest ones within a bound."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

Item = dict[str, Any]


class _Stored(NamedTuple):
    items: list[Item]
    made: list[str]
    size: int


class ResponseStore:
    """Conversations by the id of their last answer; those used longest ago are forgotten first.

    Args:
        most, most_characters: answers, and characters of their conversations in all.
    """

    def __init__(self, *, most: int = 1000, most_characters: int = 1 << 26) -> None:
        self._most, self._most_characters = most, most_characters
        self._stored: OrderedDict[str, _Stored] = OrderedDict()
        self._items: dict[str, Item] = {}
        self._characters = 0

    def add(self, name: str, items: Sequence[Item], made: Sequence[Item]) -> None:
        """Keep an answer: all items of its conversation, of which it made the last ones."""
        whole = [*items, *made]
        stored = _Stored(whole, [str(item["id"]) for item in made], len(json.dumps(whole)))
        self._stored[name] = stored
        self._items |= {str(item["id"]): item for item in made}
        self._characters += stored.size
        while self._stored and (len(self._stored) > self._most or self._characters > self._most_characters):
            _, oldest = self._stored.popitem(last=False)
            self._characters -= oldest.size
            for item in oldest.made:
                self._items.pop(item, None)

    def items_of(self, name: str) -> list[Item] | None:
        """The conversation up to and with an answer, None for one that is not known."""
        found = self._stored.get(name)
        if found is None:
            return None
        self._stored.move_to_end(name)
        return found.items

    def item(self, name: str) -> Item | None:
        """An item that an answer made."""
        return self._items.get(name)
