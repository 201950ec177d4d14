"""Limits of containers and schedulers, in the files of both kinds of control groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnnlib.system import cgroups, machine
from cnnlib.system.machine import provenance, usable_cores

pytestmark = pytest.mark.quick

GIB = 2**30
V2 = "31 23 0:28 {inside} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "24 1 0:22 / /sys rw - sysfs sysfs rw\n"
    "31 24 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "33 31 0:30 {inside} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 {inside} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


class Machine:
    """A root folder with the files of a machine's control groups."""

    def __init__(self, root: Path, mounts: str, groups: str) -> None:
        self.root = root
        self.write("proc/self/mountinfo", mounts)
        self.write("proc/self/cgroup", groups)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def v2(root: Path, own: str = "/", inside: str = "/") -> Machine:
    return Machine(root, V2.format(inside=inside), f"0::{own}\n")


def v1(root: Path, own: str = "/", inside: str = "/") -> Machine:
    groups = f"9:cpuset:/other\n4:memory:{own}\n3:cpu,cpuacct:{own}\n1:name=systemd:/\n0::/\n"
    return Machine(root, V1.format(inside=inside), groups)


@pytest.mark.parametrize(
    ("cpu_max", "quota"),
    [("150000 100000", 1.5), ("max 100000", None), ("50000 20000", 2.5), ("", None), ("x y", None)],
)
def test_cpu_max_of_a_container(tmp_path: Path, cpu_max: str, quota: float | None) -> None:
    v2(tmp_path).write("sys/fs/cgroup/cpu.max", f"{cpu_max}\n")
    assert cgroups.cpu_quota(tmp_path) == quota


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    here = v2(tmp_path, own="/user.slice/job/step")
    here.write("sys/fs/cgroup/user.slice/job/step/cpu.max", "max 100000\n")
    here.write("sys/fs/cgroup/user.slice/job/cpu.max", "200000 100000\n")
    here.write("sys/fs/cgroup/user.slice/cpu.max", "800000 100000\n")
    here.write("sys/fs/cgroup/system.slice/cpu.max", "10000 100000\n")
    assert cgroups.cpu_quota(tmp_path) == 2


@pytest.mark.parametrize(
    ("own", "inside"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../../docker/abc", "/"), ("/x", "/docker/abc")],
    ids=["mounted by its name", "namespace", "above the namespace", "mounted by another name"],
)
@pytest.mark.parametrize("kind", [v1, v2])
def test_a_container_sees_its_own_group_on_top(
    tmp_path: Path, kind: "type[Machine]", own: str, inside: str
) -> None:
    here = kind(tmp_path, own, inside)
    here.write("sys/fs/cgroup/cpu.max", "300000 100000\n")
    here.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
    here.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert cgroups.cpu_quota(tmp_path) == 3


@pytest.mark.parametrize(("microseconds", "quota"), [("-1", None), ("250000", 2.5), ("0", None)])
def test_cfs_quota_of_version_1(tmp_path: Path, microseconds: str, quota: float | None) -> None:
    here = v1(tmp_path, own="/slurm/job_7")
    for name, value in (("quota", microseconds), ("period", "100000")):
        here.write(f"sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_{name}_us", f"{value}\n")
    here.write("sys/fs/cgroup/cpuset/other/cpu.cfs_quota_us", "1\n")
    assert cgroups.cpu_quota(tmp_path) == quota


def test_no_control_groups(tmp_path: Path) -> None:
    assert cgroups.cpu_quota(tmp_path) is None
    assert cgroups.memory_left(tmp_path) is None


def test_memory_that_a_container_has_left(tmp_path: Path) -> None:
    here = v2(tmp_path, own="/job")
    here.write("sys/fs/cgroup/job/memory.max", f"{8 * GIB}\n")
    here.write("sys/fs/cgroup/job/memory.current", f"{5 * GIB}\n")
    here.write("sys/fs/cgroup/job/memory.stat", f"anon 7\ninactive_file {2 * GIB}\n")
    here.write("sys/fs/cgroup/memory.max", "max\n")
    assert cgroups.memory_left(tmp_path) == 5 * GIB


def test_memory_of_version_1(tmp_path: Path) -> None:
    here = v1(tmp_path, own="/job")
    here.write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", f"{2 * GIB}\n")
    here.write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", f"{3 * GIB}\n")
    here.write(
        "sys/fs/cgroup/memory/job/memory.stat", f"inactive_file 1\ntotal_inactive_file {7}\n"
    )
    assert cgroups.memory_left(tmp_path) == 0
    here.write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "9223372036854771712\n")
    assert cgroups.memory_left(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "cores"), [(None, 4), (8.0, 4), (2.0, 2), (1.999, 2), (2.5, 2), (0.25, 1)]
)
def test_the_smaller_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert usable_cores() == cores
    facts = provenance()
    assert (facts["cores"], facts["cpu_quota"]) == (cores, quota)


def test_a_quota_of_this_machine(tmp_path: Path) -> None:
    """A process put into a group with a quota, where this machine lets groups be made."""
    mounts = list(cgroups._mounts(Path("/"), "cpu")) + list(cgroups._mounts(Path("/"), cgroups.V2))
    for _, mount in mounts:
        group = mount / f"cnnlib-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / "cpu.cfs_quota_us").exists():
                (group / "cpu.cfs_quota_us").write_text("50000")
            elif (group / "cpu.max").exists():
                (group / "cpu.max").write_text("50000 100000")
            else:
                continue
            program = "from cnnlib.system.machine import *; print(cpu_quota(), usable_cores())"
            script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
            done = subprocess.run(
                ["sh", "-c", script, str(group), sys.executable, "-c", program],
                cwd=machine.ROOT,
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
            assert done.stdout == "0.5 1\n"
            return
        finally:
            group.rmdir()
    pytest.skip("no group with a quota can be made here")
