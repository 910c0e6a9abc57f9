"""Which CPUs are beside a GPU, as Linux lists them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specontext.kv.nearby import cpus_near, cpus_of

ADDRESS = "0000:1b:00.0"


@pytest.mark.parametrize(
    "listed, cpus", [("0-3,8-9\n", {0, 1, 2, 3, 8, 9}), ("7\n", {7}), ("\n", set()), ("nonsense", set()), (None, set())]
)
def test_lists_of_cpus(tmp_path: Path, listed: str | None, cpus: set[int]) -> None:
    (tmp_path / ADDRESS).mkdir()
    if listed is not None:
        (tmp_path / ADDRESS / "local_cpulist").write_text(listed)
    assert cpus_of(ADDRESS, tmp_path) == cpus


def test_a_cpu_is_near_itself() -> None:
    assert cpus_near(torch.device("cpu")) == set()
