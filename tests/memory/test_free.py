"""Free memory of the host: the lesser of what the system has and of what every control group around this process leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from specontext.memory.free import available, free_host_memory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNLIMITED_V1 = 9223372036854771712


class Machine:
    """What /proc and /sys/fs/cgroup say."""

    def __init__(self, folder: Path, groups: str, free: int = 8 * GIB) -> None:
        self.proc, self.control_groups = folder / "proc", folder / "cgroup"
        self.write(
            "proc/meminfo", f"MemTotal: {64 * MIB} kB\nMemFree: 12 kB\nMemAvailable:   {free // KIB} kB\nBuffers: 0 kB\n", folder
        )
        self.write("proc/self/cgroup", groups, folder)

    def write(self, name: str, text: str, folder: Path | None = None) -> None:
        file = (folder or self.control_groups) / name.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group(self, path: str, limit: int | str, used: int, *, cache: int = 0, high: int | str = "max") -> None:
        """A control group of version 2."""
        self.write(f"{path}/memory.max", f"{limit}\n")
        self.write(f"{path}/memory.high", f"{high}\n")
        self.write(f"{path}/memory.current", f"{used}\n")
        self.write(f"{path}/memory.stat", f"anon 5\nfile {2 * cache}\nactive_file {cache}\ninactive_file {cache}\nslab 7\n")

    def former_group(self, path: str, limit: int, used: int, *, cache: int = 0) -> None:
        """A control group of version 1."""
        self.write(f"memory/{path}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"memory/{path}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"memory/{path}/memory.stat", f"cache 1\ninactive_file 3\ntotal_inactive_file {cache}\n")

    @property
    def free(self) -> int:
        return free_host_memory(self.proc, self.control_groups)


def test_without_limits_it_is_what_the_system_calls_available(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/user.slice/session\n")
    machine.group("user.slice", "max", 3 * GIB)
    assert machine.free == 8 * GIB
    machine.former_group("", UNLIMITED_V1, 5 * GIB)
    assert machine.free == 8 * GIB


def test_the_limit_of_a_container_that_sees_itself_as_the_root(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n")
    machine.group("", 4 * GIB, 3 * GIB, cache=GIB)
    assert machine.free == 2 * GIB, "pages of files that nobody uses are given up first"


@pytest.mark.parametrize(("system", "outer", "inner", "expected"), [(8, 6, 3, 2), (8, 2, 5, 1), (1, 6, 5, 1), (8, 1, 0, 0)])
def test_nested_groups_up_to_the_root(tmp_path: Path, system: int, outer: int, inner: int, expected: int) -> None:
    machine = Machine(tmp_path, "0::/pods/pod/container\n", free=system * GIB)
    machine.group("pods", "max", 100 * GIB)
    machine.group("pods/pod", outer * GIB, GIB)
    machine.group("pods/pod/container", inner * GIB, GIB)
    assert machine.free == expected * GIB


def test_a_group_is_slowed_down_beyond_its_high_mark(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/a\n")
    machine.group("a", 7 * GIB, GIB, high=3 * GIB)
    assert machine.free == 2 * GIB


def test_version_1(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "12:cpu,cpuacct:/elsewhere\n4:memory:/batch/job\n1:name=systemd:/\n0::/\n")
    machine.former_group("batch", 5 * GIB, 2 * GIB)
    machine.former_group("batch/job", UNLIMITED_V1, GIB)
    machine.former_group("elsewhere", GIB, GIB)  # of another controller's path
    assert machine.free == 3 * GIB
    machine.former_group("batch/job", 2 * GIB, GIB, cache=MIB)
    assert machine.free == GIB + MIB


def test_version_1_in_a_container_that_sees_the_paths_of_its_host(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "4:memory:/docker/0123abcd\n")
    machine.former_group("", 2 * GIB, GIB)
    assert machine.free == GIB


def test_both_versions_at_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "4:memory:/\n0::/unit\n")
    machine.former_group("", UNLIMITED_V1, GIB)
    machine.group("unified/unit", 3 * GIB, GIB)
    assert machine.free == 2 * GIB


@pytest.mark.parametrize("groups", ["", "nonsense\n", "0::/../..\n", "4:memory:/gone\n", "0::/gone\n\n"])
def test_what_cannot_be_read_limits_nothing(tmp_path: Path, groups: str) -> None:
    assert Machine(tmp_path, groups).free == 8 * GIB


def test_a_group_above_its_limit_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/a\n")
    machine.group("a", GIB, 2 * GIB)
    assert machine.free == 0


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert available(tmp_path) > 1 << 20 and free_host_memory(tmp_path, tmp_path) == available(tmp_path)


def test_this_machine() -> None:
    assert 0 < free_host_memory() <= available() + (1 << 30)  # others may give memory back between the two readings
