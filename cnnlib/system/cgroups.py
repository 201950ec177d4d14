"""Limits that a container or a scheduler sets by control groups, of version 1 and 2.

A limit holds for all groups below it, so that the smallest on the way up counts. In a container
the groups above its own are out of sight, and so may be the name by which it knows its own.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

V2 = ""
"""The name used here for all controllers in the one hierarchy of cgroup v2."""


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process may use, e.g. 1.5; None where nothing limits it.

    `root`: the folder in which proc/ and sys/ lie.
    """
    quotas = []
    for folder in _groups(root, V2):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(_share(quota, period))
    for folder in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
            quotas.append(_share(quota, period))
    return min((quota for quota in quotas if 0 < quota < math.inf), default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that this process's groups may still take; None where nothing limits them.

    Pages of files that are in memory but have not been used lately are given up first: they count
    as free, as they do in MemAvailable.
    """
    left = []
    for controller, limit, usage, inactive in (
        (V2, "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _groups(root, controller):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())  # v2 says 'max' where there is none
                if most < 1 << 60:  # v1 says a number as large as it can count
                    used = int((folder / usage).read_text())
                    left.append(most - used + _field(folder / "memory.stat", inactive))
    return max(0, min(left)) if left else None


def _share(quota: str, period: str) -> float:
    return math.inf if quota.strip() == "max" else int(quota) / int(period)


def _field(path: Path, name: str) -> int:
    """The number behind `name` in a file of names and numbers; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of the visible groups above it."""
    own = _own_group(root, controller)
    for inside, mount in _mounts(root, controller):
        # mounted may be the whole hierarchy or, in a container, only what lies below `inside`
        top = f"{inside.rstrip('/')}/"
        below = own.removeprefix(top) if own.startswith(top) and ".." not in own else ""
        folder = mount / below
        yield folder
        while folder != mount:
            folder = folder.parent
            yield folder


def _own_group(root: Path, controller: str) -> str:
    """The path of this process's group within a hierarchy."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return path
    return "/"


def _mounts(root: Path, controller: str) -> Iterator[tuple[str, Path]]:
    """The mounts of a hierarchy, each with the path within the hierarchy that is mounted there."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            fields, _, kind = line.partition(" - ")
            name, _, options = kind.partition(" ")
            wanted = name == "cgroup2" if controller == V2 else name == "cgroup"
            if wanted and (controller == V2 or controller in options.split()[-1].split(",")):
                inside, mount = fields.split()[3:5]
                yield inside, root / mount.lstrip("/")
