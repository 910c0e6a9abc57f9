"""The thread that watches the processes of ranks."""

from __future__ import annotations

import multiprocessing

import pytest

from specontext.engine.rank_processes import RankProcesses


def test_it_ends_without_a_word_when_connections_are_closed_under_its_hands() -> None:
    alone = RankProcesses(1, threads=None, patience=1.0)
    here, there = multiprocessing.Pipe()
    here.close()
    there.close()
    alone._connections = [here]
    with pytest.raises(OSError, match="closed"):
        alone._watch()
    alone.end()
    alone._watch()
    assert not alone.lost
