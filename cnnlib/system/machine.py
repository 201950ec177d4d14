"""The machine and the software a measurement was made on: its provenance."""

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from cnnlib.paths import INSTALLED, PACKAGE, ROOT
from cnnlib.system import cgroups

DRIVER = Path("/sys/module/nvidia/version")
LIBRARIES = ("numpy", "pandas", "pycuda", "nvidia-ml-py", "snakemake", "torch", "jax")


def cpu_name() -> str:
    """The processor's name as the kernel gives it, or its architecture where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may keep busy: those it may run on, or fewer where its time is limited.

    A container may have time for 1.5 cores though it runs on any of 64. More threads than that are
    all stopped for the rest of each period, usually 0.1 s, which would distort timings. The quota
    is therefore rounded down, except where a tenth of a core or less is missing.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota + 0.1)))


@functools.cache
def cpu_quota() -> float | None:
    """Cores' worth of time that the system gives this process (cgroups); None: no limit."""
    return cgroups.cpu_quota()


def cpu_description(threads: int | None) -> str:
    """Name of the processor with the number of threads used; None: all usable cores."""
    count = threads or usable_cores()
    return f"{cpu_name()}, {count} thread{'s' if count > 1 else ''}"


def commit() -> str:
    """The commit of this checkout, with '+changes' when files differ from it; '' outside git.

    An installed package has the commit that it was built from in a file.
    """
    if INSTALLED:  # git would find the repository, if any, that the environment lies in
        built_from = PACKAGE / "commit.txt"
        return built_from.read_text(encoding="utf-8") if built_from.is_file() else ""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def driver_version() -> str | None:
    """The version of the NVIDIA driver's kernel module, such as 580.95.05; None where none is seen.

    From a file, because a driver that hangs would not answer.
    """
    try:
        return DRIVER.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def provenance() -> dict[str, Any]:
    """Commit, versions of Python, libraries and the driver, processor and system."""
    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "libraries": libraries,
        "driver": driver_version(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        # cores' worth of time that a container or a scheduler gives; None: no limit
        "cpu_quota": cpu_quota(),
        "system": platform.platform(),
        # what a scheduler leaves of the machine's GPUs; None: all
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
