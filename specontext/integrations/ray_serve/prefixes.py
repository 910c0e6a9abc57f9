"""Which replica knows how much of a prompt, as far as its requests tell: prompts as marks of their beginnings."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

FIRST = 128  # bytes of the shortest beginning that is looked at
GROWTH = 1.25  # each further one is this much longer: what is known is seen up to a fifth of it
LONGEST = 1 << 20
# In the order in which chat templates write them.
_PARTS = ("tools", "system", "instructions", "prompt", "messages", "input")
_SLACK, _SHARE = 4.0, 1.25  # a replica may have this much more to do than the mean before prompts that it knows go elsewhere


def _lengths() -> tuple[int, ...]:
    found = [FIRST]
    while found[-1] * GROWTH < LONGEST:
        found.append(int(found[-1] * GROWTH))
    return tuple(found)


LENGTHS = _lengths()


def prefix_marks(body: Any) -> tuple[bytes, ...]:
    """Marks of the beginnings of a request's prompt, shortest first: equal beginnings have equal marks.

    Args:
        body: the parsed JSON of a request in any protocol of the server.
    """
    if not isinstance(body, dict):
        return ()
    parts = [body[name] for name in _PARTS if body.get(name)]
    if not parts:
        return ()
    text = json.dumps(parts, separators=(",", ":")).encode("ascii")
    state, at, marks = hashlib.blake2b(digest_size=8), 0, []
    for length in LENGTHS:
        if length > len(text):
            break
        state.update(text[at:length])
        at = length
        marks.append(state.digest())
    return tuple(marks)


class PrefixTable:
    """Remembers which replicas have seen a beginning, and puts replicas in order for a prompt.

    Args:
        most: marks that are remembered; those used longest ago are forgotten first.
    """

    def __init__(self, most: int = 100_000) -> None:
        self._most = most
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()

    def note(self, marks: Sequence[bytes], replica: str) -> None:
        """A replica has been given a prompt."""
        for mark in marks:
            self._seen.setdefault(mark, set()).add(replica)
            self._seen.move_to_end(mark)
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def keep(self, replicas: set[str]) -> None:
        """Forget all replicas but these."""
        for mark in [mark for mark, seen in self._seen.items() if not seen <= replicas]:
            self._seen[mark] &= replicas
            if not self._seen[mark]:
                del self._seen[mark]

    def order(self, marks: Sequence[bytes], loads: Mapping[str, int]) -> list[str]:
        """Replicas, best first: those that have not too much to do, of these the one that knows most of the prompt.

        A prompt that nobody knows goes where its beginning says, so that others who choose among the same replicas, at the same
        time or in another process, choose the same one; a prompt without a beginning goes where there is least to do.

        Args:
            loads: open requests of each replica.
        """
        most = _SLACK + _SHARE * sum(loads.values()) / max(1, len(loads))
        known = {replica: self._known(marks, replica) for replica in loads}
        nobody = not any(known.values())

        def rank(replica: str) -> tuple[bool, int, bytes, int, str]:
            place = hashlib.blake2b(replica.encode(), key=marks[0], digest_size=8).digest() if marks and nobody else b""
            return loads[replica] > most, -known[replica], place, loads[replica], replica

        return sorted(loads, key=rank)

    def _known(self, marks: Sequence[bytes], replica: str) -> int:
        """How many of the marks, without a gap, a replica has seen."""
        for count, mark in enumerate(marks):
            if replica not in self._seen.get(mark, ()):
                return count
        return len(marks)
