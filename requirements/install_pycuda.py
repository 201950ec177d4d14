"""Install PyCUDA and cuda-bindings into this environment if there are a CUDA toolkit and a driver.

PyCUDA comes as source only and is built against both. Its build finds neither a toolkit whose nvcc
on PATH is a wrapper elsewhere nor a driver without developer files, so it gets their folders. Says
in one line when it builds, when that fails and when there is a driver but no toolkit to build with;
none of these ends the run, which continues without the GPU.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).with_name("cuda.txt")
LOG = Path(sys.prefix) / "pycuda.log"  # of a build that failed
PERSONAL = (".cache", ".config", ".netrc", ".pip")  # what pip reads in a home folder


def driver() -> Path | None:
    """Return the libcuda.so.1 that programs on this machine load, or None."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libcuda.so" in line:
            return Path(line[line.index("/") :])
    return None


def build(cuda: Path, include: Path, libcuda: Path, home: Path) -> bool:
    """Run pip with `home` as the home folder, the only place PyCUDA's build takes settings from."""
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        for name in PERSONAL:
            if (Path.home() / name).exists():
                (home / name).symlink_to(Path.home() / name)
    (home / "libcuda.so").symlink_to(libcuda)
    settings = {
        "CUDA_ROOT": str(cuda),
        "CUDA_INC_DIR": [str(include)],
        "CUDADRV_LIB_DIR": [str(home)],
        "CUDA_ENABLE_CURAND": False,
        "CXXFLAGS": ["-g0", "-w"],
    }
    lines = [f"{name} = {value!r}\n" for name, value in settings.items()]
    (home / ".aksetup-defaults.py").write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "-r", LOCK]
    with open(home / "log", "w") as log:
        done = subprocess.run(
            command, env={**os.environ, "HOME": str(home)}, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode == 0 and not missing():
        return True
    shutil.copy(home / "log", LOG)
    return False


def missing() -> list[str]:
    """Return which of the libraries do not load their extension modules."""
    modules = {"PyCUDA": "pycuda.driver", "cuda-bindings": "cuda.bindings.driver"}
    commands = {
        name: [sys.executable, "-c", f"import {module}"] for name, module in modules.items()
    }
    return [
        name
        for name, command in commands.items()
        if subprocess.run(command, capture_output=True).returncode
    ]


def main() -> None:
    """Install what is missing of both if this machine could use it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cnnlib.device.toolkit import find_toolkit, toolkit_problem

    libcuda = driver()
    if libcuda is None:
        return
    wanted = " and ".join(missing())
    if problem := toolkit_problem(headers="PyCUDA" in wanted):
        print(f"There is an NVIDIA driver, but {problem}; continuing without the GPU")
        return
    toolkit = find_toolkit()
    if not wanted or toolkit is None:
        return
    include = toolkit.include or toolkit.root / "include"
    # Without cuda-bindings only what is launched as CUDA graphs is unavailable.
    effect = "continuing without " + ("the GPU" if "PyCUDA" in wanted else "CUDA graphs")
    if LOG.exists():
        print(f"{wanted} did not install here: {effect} (delete {LOG} to try again)")
        return
    print(f"Installing {wanted} for {toolkit.root} (PyCUDA takes a minute or two)", flush=True)
    with tempfile.TemporaryDirectory() as home:
        if not build(toolkit.root, include, libcuda, Path(home)):
            print(f"{wanted} did not install: {effect}; see {LOG}")


if __name__ == "__main__":
    main()
