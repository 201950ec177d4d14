"""Install PyCUDA into this environment where a CUDA toolkit and a driver are; else do nothing.

PyCUDA comes as source only and is built against both. Its build finds neither a toolkit whose nvcc
on PATH is a wrapper elsewhere nor a driver without developer files, so it is told where they are.
Says in one line when it tries and when that fails; a failure does not end the run, which goes on
without the GPU.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).with_name("cuda.txt")
LOG = Path(sys.prefix) / "pycuda.log"  # of a build that failed
PERSONAL = (".cache", ".config", ".netrc", ".pip")  # what pip reads in a home folder


def toolkit() -> Path | None:
    """The folder that holds bin/nvcc and include/cuda.h."""
    candidates = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_ROOT", "CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parents[1]))
        # a wrapper: nvcc itself says where it lies
        command = [nvcc, "--dryrun", "-x", "cu", "/dev/null"]
        shown = subprocess.run(command, capture_output=True, text=True).stderr
        candidates += re.findall(r"^#\$ TOP=(.+)$", shown, re.MULTILINE)
    candidates += ["/usr/local/cuda", "/opt/cuda"]
    for root in (Path(text).resolve() for text in candidates if text):
        if (root / "bin/nvcc").exists() and (root / "include/cuda.h").exists():
            return root
    return None


def driver() -> Path | None:
    """The libcuda.so.1 that programs here get."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libcuda.so" in line:
            return Path(line[line.index("/") :])
    return None


def build(cuda: Path, libcuda: Path, home: Path) -> bool:
    """Run pip with `home` as the home folder, the only place PyCUDA's build takes settings from."""
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        for name in PERSONAL:
            if (Path.home() / name).exists():
                (home / name).symlink_to(Path.home() / name)
    (home / "libcuda.so").symlink_to(libcuda)
    settings = {
        "CUDA_ROOT": str(cuda),
        "CUDA_INC_DIR": [str(cuda / "include")],
        "CUDADRV_LIB_DIR": [str(home)],
        "CUDA_ENABLE_CURAND": False,
        "CXXFLAGS": ["-g0", "-w"],
    }
    lines = [f"{name} = {value!r}\n" for name, value in settings.items()]
    (home / ".aksetup-defaults.py").write_text("".join(lines))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "-r", LOCK]
    with open(home / "log", "w") as log:
        done = subprocess.run(
            command, env={**os.environ, "HOME": str(home)}, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode == 0 and works():
        return True
    shutil.copy(home / "log", LOG)
    return False


def works() -> bool:
    """Whether PyCUDA's extension modules load."""
    command = [sys.executable, "-c", "import pycuda.driver"]
    return subprocess.run(command, capture_output=True).returncode == 0


def main() -> None:
    """Build PyCUDA if it can be of use and is not there."""
    cuda, libcuda = toolkit(), driver()
    if cuda is None or libcuda is None or works():
        return
    if LOG.exists():
        print(f"PyCUDA did not build here: going on without the GPU (delete {LOG} to try again)")
        return
    print(f"Building PyCUDA against {cuda} (a minute or two)", flush=True)
    with tempfile.TemporaryDirectory() as home:
        if not build(cuda, libcuda, Path(home)):
            print(f"PyCUDA did not build: going on without the GPU; the reason stands in {LOG}")


if __name__ == "__main__":
    main()
