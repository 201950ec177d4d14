"""Finds the CUDA toolkit of this machine, the same one for the library and for building PyCUDA.

The search covers, in this order, the folders that CUDA_HOME, CUDA_ROOT and CUDA_PATH name, the nvcc
on PATH, the conda environment, /usr/local/cuda and /opt/cuda, and folders such as
/usr/local/cuda-13.0, the newest first. The first one with both nvcc and cuda.h is taken; where
there is none, the first one with nvcc, which is enough where PyCUDA is installed already.
"""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cnnlib.device.compiler import english, version_text
from cnnlib.errors import DeviceError

VARIABLES = ("CUDA_HOME", "CUDA_ROOT", "CUDA_PATH")
USUAL_PLACES = ("/usr/local/cuda", "/opt/cuda", "/usr/local/cuda-*", "/opt/cuda-*")
TARGETS = {"aarch64": ("sbsa-linux", "aarch64-linux")}
"""Folders below targets/ by processor, where they do not have the processor's name."""


class Toolkit(NamedTuple):
    """An nvcc, and the folder that it and its headers belong to."""

    root: Path
    nvcc: str
    include: Path | None
    """The folder of cuda.h; None: it is not installed."""


def find_toolkit() -> Toolkit | None:
    """The toolkit to use here, or None."""
    names = (*VARIABLES, "CONDA_PREFIX", "PATH")
    return _find(tuple(os.environ.get(name, "") for name in names), USUAL_PLACES)


def toolkit_problem(headers: bool = False) -> str:
    """Why there is no toolkit that can be used, in one line; empty when there is one.

    `headers`: whether cuda.h is needed too, as it is to build PyCUDA.
    """
    toolkit = find_toolkit()
    if toolkit is None:
        wrong = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
        has_none = f"; {', '.join(wrong)} has no bin/nvcc" if wrong else ""
        return (
            f"no CUDA toolkit (nvcc is neither on PATH nor below {', '.join(VARIABLES)}, "
            f"/usr/local/cuda or /opt/cuda{has_none})"
        )
    if headers and toolkit.include is None:
        return (
            f"the CUDA toolkit in {toolkit.root} has no cuda.h (neither in include/ nor in "
            "targets/*/include/): install its headers, e.g. conda's package cuda-driver-dev"
        )
    try:
        nvcc_version(toolkit.nvcc)
    except DeviceError as error:
        return str(error)
    return ""


@functools.cache
def nvcc_version(nvcc: str) -> str:
    """The output of `nvcc --version`; DeviceError when nvcc does not run."""
    try:
        return version_text([nvcc])
    except (OSError, subprocess.SubprocessError) as error:
        raise DeviceError(f"'{nvcc} --version' fails: {str(error).rstrip('.')}") from error


@functools.cache
def _find(environment: tuple[str, ...], usual: tuple[str, ...]) -> Toolkit | None:
    *roots, path = environment
    found = [
        toolkit
        for toolkit in _candidates(roots, path, usual)
        if os.access(toolkit.nvcc, os.X_OK) and not os.path.isdir(toolkit.nvcc)
    ]
    return next((toolkit for toolkit in found if toolkit.include), found[0] if found else None)


def _candidates(roots: list[str], path: str, usual: tuple[str, ...]) -> Iterator[Toolkit]:
    *variables, conda = roots
    for text in filter(None, variables):
        yield _at(Path(text))
    if nvcc := shutil.which("nvcc", path=path):
        for root in (Path(nvcc).resolve().parent.parent, *_own_folder(nvcc)):
            yield Toolkit(root, nvcc, _include(root))
    # an environment of conda, or one made by conda's Python
    for text in filter(None, (conda, sys.base_prefix)):
        yield _at(Path(text))
    for pattern in usual:
        folders = Path("/").glob(pattern.lstrip("/")) if "*" in pattern else [Path(pattern)]
        for folder in sorted(folders, key=_numbers, reverse=True):
            yield _at(folder)


def _at(root: Path) -> Toolkit:
    return Toolkit(root, str(root / "bin" / "nvcc"), _include(root))


def _include(root: Path) -> Path | None:
    machine = platform.machine()
    targets = TARGETS.get(machine, (f"{machine}-linux",))
    folders = (root / "include", *(root / "targets" / name / "include" for name in targets))
    return next((folder for folder in folders if (folder / "cuda.h").is_file()), None)


def _own_folder(nvcc: str) -> list[Path]:
    """The folder that nvcc itself reports: the one on PATH may be a script that calls another."""
    try:
        shown = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            env=english(),
        ).stderr
    except (OSError, subprocess.SubprocessError):
        return []
    return [Path(top.strip()).resolve() for top in re.findall(r"^#\$ TOP=(.+)$", shown, re.M)]


def _numbers(folder: Path) -> list[int]:
    """The key by which folders are sorted by version: 12.10 is newer than 12.9."""
    return [int(number) for number in re.findall(r"\d+", folder.name)]
