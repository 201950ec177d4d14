"""One finder of CUDA toolkits, and what is said where there is a driver but no toolkit to use."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnlib.device import toolkit
from cnnlib.device.compiler import find_compiler
from cnnlib.device.cuda import find_nvcc
from cnnlib.device.toolkit import find_toolkit, toolkit_problem
from cnnlib.paths import ROOT

TARGET = {"aarch64": "sbsa-linux"}.get(platform.machine(), f"{platform.machine()}-linux")
ORDINARY, CONDA = "include", f"targets/{TARGET}/include"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No toolkit anywhere, and no folder of programs but that of the shell."""
    for name in (*toolkit.VARIABLES, "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sh").symlink_to(str(shutil.which("sh")))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(toolkit, "USUAL_PLACES", ())
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "nowhere"))


def install(root: Path, headers: str | None = ORDINARY, nvcc: str = "echo release 1.0") -> Path:
    """A toolkit in `root`, as far as the finder can see."""
    program(root / "bin" / "nvcc", nvcc)
    if headers:
        (root / headers).mkdir(parents=True)
        (root / headers / "cuda.h").touch()
    return root


def program(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("headers", [ORDINARY, CONDA])
@pytest.mark.parametrize("variable", [*toolkit.VARIABLES, "CONDA_PREFIX"])
def test_named_by_a_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, headers: str
) -> None:
    assert find_toolkit() is None
    root = install(tmp_path / "here", headers)
    monkeypatch.setenv(variable, str(root))
    assert find_toolkit() == (root, str(root / "bin/nvcc"), root / headers)
    assert toolkit_problem(headers=True) == ""
    assert find_nvcc() == str(root / "bin/nvcc")


@pytest.mark.parametrize("headers", [ORDINARY, CONDA])
@pytest.mark.parametrize("way", ["itself", "link", "script"])
def test_nvcc_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str, headers: str
) -> None:
    root = tmp_path / "here"
    # what `nvcc --dryrun` writes, whoever calls it
    install(root, headers, f"echo '#$ _SPACE_= ' >&2; echo '#$ TOP={root}/bin/..' >&2")
    on_path = tmp_path / "programs" / "nvcc"
    if way == "itself":
        on_path = root / "bin" / "nvcc"
        monkeypatch.setenv("PATH", f"{root}/bin:{os.environ['PATH']}")
    elif way == "link":
        on_path.symlink_to(root / "bin" / "nvcc")
    else:
        program(on_path, f'exec {root}/bin/nvcc "$@"')
    assert find_toolkit() == (root, str(on_path), root / headers)


@pytest.mark.parametrize("names", [("cuda", "cuda-13.0"), ("cuda-12.10", "cuda-12.9", "cuda-8")])
def test_usual_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """The one without a version comes first; of several versions the newest."""
    places = (str(tmp_path / "cuda"), str(tmp_path / "cuda-*"))
    monkeypatch.setattr(toolkit, "USUAL_PLACES", places)
    for name in reversed(names):
        install(tmp_path / name)
    found = find_toolkit()
    assert found
    assert found.root == tmp_path / names[0]


def test_a_python_of_condas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "base_prefix", str(install(tmp_path / "miniforge", CONDA)))
    found = find_toolkit()
    assert found
    assert found.include == tmp_path / "miniforge" / CONDA


def test_headers_decide_between_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that is named but empty, then one without headers, then a whole one."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_ROOT", str(install(tmp_path / "bare", None)))
    found = find_toolkit()
    assert found
    assert (found.root, found.include) == (tmp_path / "bare", None)
    assert toolkit_problem() == ""
    assert "has no cuda.h" in toolkit_problem(headers=True)
    assert str(tmp_path / "bare") in toolkit_problem(headers=True)
    monkeypatch.setenv("CUDA_PATH", str(install(tmp_path / "whole")))
    found = find_toolkit()
    assert found
    assert found.root == tmp_path / "whole"


def test_none_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path))
    assert toolkit_problem() == (
        "no CUDA toolkit (nvcc is neither on PATH nor below CUDA_HOME, CUDA_ROOT, CUDA_PATH, "
        f"/usr/local/cuda or /opt/cuda; CUDA_ROOT={tmp_path} has no bin/nvcc)"
    )


def test_an_nvcc_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(install(tmp_path / "here", nvcc="exec /nowhere/nvcc")))
    problem = toolkit_problem()
    assert f"'{tmp_path}/here/bin/nvcc --version' fails" in problem
    assert "\n" not in problem


# a machine with a driver ----------------------------------------------------------------------

DRIVER = """
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuDeviceGetAttribute(int* value, int which, int) { *value = which == 75 ? 99 : 9; return 0; }
}
"""
BEGIN = """
import runpy, sys
from cnnlib.device import toolkit
toolkit.USUAL_PLACES = ()
sys.base_prefix = "/nowhere"
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Runs Python where a driver sees a GPU of a kind yet to come (sm_999); what it printed."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PATH", MACHINES_PATH)
        compiler = find_compiler().command
        command = [*compiler, "-shared", "-fPIC", "driver.cpp", "-o", "libcuda.so.1"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)

    def run(program: str, **environment: str) -> str:
        paths = [str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")]
        done = subprocess.run(
            [sys.executable, "-c", BEGIN + program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(paths), **environment},
        )
        return done.stdout

    return run


MACHINES_PATH = os.environ["PATH"]
MACHINES_NVCC = find_nvcc()


INSTALLER = "runpy.run_path('requirements/install_pycuda.py', run_name='__main__')"


def test_the_installer_says_that_there_is_no_toolkit(run: Callable[..., str]) -> None:
    (line,) = run(INSTALLER).splitlines()
    assert line.startswith("There is an NVIDIA driver, but no CUDA toolkit (nvcc is neither on")
    assert line.endswith("; continuing without the GPU")


def test_the_installer_says_what_a_toolkit_lacks(run: Callable[..., str], tmp_path: Path) -> None:
    (line,) = run(INSTALLER, CUDA_PATH=str(install(tmp_path / "here", None))).splitlines()
    assert f"but the CUDA toolkit in {tmp_path}/here has no cuda.h" in line


PARTS = "from cnnlib.device.cuda import missing_parts; print(*missing_parts(), sep='\\n')"
OPEN = """
import warnings
from cnnlib.device import open_device
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(open_device().kind)
print(caught[0].message)
"""


def test_the_library_says_that_there_is_no_toolkit(run: Callable[..., str]) -> None:
    assert run(PARTS).startswith("no CUDA toolkit (nvcc is neither on PATH nor below CUDA_HOME")
    hidden = "toolkit._find = lambda *_: None\n"
    kind, warning = run(hidden + OPEN, PATH=MACHINES_PATH).splitlines()
    assert kind == "emulated"
    assert warning.startswith("there is a GPU but no CUDA toolkit (nvcc")
    assert warning.endswith("kernels are emulated on the CPU instead")


@pytest.mark.skipif(MACHINES_NVCC is None, reason="no nvcc here")
def test_a_toolkit_older_than_the_gpu(run: Callable[..., str], tmp_path: Path) -> None:
    environment = {
        "CUDA_HOME": str(Path(str(MACHINES_NVCC)).parents[1]),
        "PATH": MACHINES_PATH,
        "CNNLIB_CACHE": str(tmp_path / "cache"),
    }
    parts = run(PARTS, **environment).splitlines()
    assert parts[0].startswith(f"{MACHINES_NVCC} cannot build for this GPU (sm_999): ")
    assert "nsupported gpu architecture" in parts[0]


@pytest.mark.skipif(MACHINES_NVCC is None, reason="no nvcc here")
def test_a_toolkit_without_a_c_compiler(run: Callable[..., str], tmp_path: Path) -> None:
    real = Path(str(MACHINES_NVCC)).resolve()
    root = install(tmp_path / "here", nvcc=f'exec {real} "$@"')
    environment = {"CUDA_HOME": str(root), "CNNLIB_CACHE": str(tmp_path / "cache")}
    program = "from cnnlib.device import cuda; cuda.gpu_architecture = lambda: 'sm_90'\n" + PARTS
    said = run(program, **environment).splitlines()[0]
    assert said.startswith(f"{root}/bin/nvcc cannot build for this GPU (sm_90): ")
    assert "Failed to preprocess host compiler" in said


@pytest.mark.parametrize(("release", "newer"), [("13.0", True), ("12.8", False), ("", False)])
def test_a_toolkit_newer_than_the_driver(
    run: Callable[..., str], tmp_path: Path, release: str, newer: bool
) -> None:
    root = install(tmp_path / "here", nvcc=f"echo 'Cuda tools, release {release}, V{release}.88'")
    program = "from cnnlib.device.cuda import newer_toolkit; print(newer_toolkit())"
    said = run(program, CUDA_HOME=str(root)).strip()
    expected = (
        f"; {root}/bin/nvcc is of CUDA 13.0, newer than the driver, which takes code of CUDA 12.4"
    )
    assert said.startswith(expected) if newer else said == ""
