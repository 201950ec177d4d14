"""The cuda device as a machine without a GPU shows it: what is missing, and kernels compiled."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnlib.device import cuda, driver, open_device, toolkit
from cnnlib.device.cache import KERNELS
from cnnlib.errors import DeviceError

nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
without_gpu = pytest.mark.skipif(driver.gpu_present(), reason="there is a GPU")


@without_gpu
def test_asking_for_cuda_says_what_is_missing() -> None:
    with pytest.raises(DeviceError, match="NVIDIA driver") as caught:
        open_device("cuda")
    assert "\n" not in str(caught.value)


@without_gpu
def test_auto_without_a_gpu_is_emulated() -> None:
    with open_device() as device:
        assert device.kind == "emulated"


def test_missing_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolkit, "USUAL_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in (*toolkit.VARIABLES, "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    assert any("toolkit (nvcc" in part for part in cuda.missing_parts())
    with pytest.raises(DeviceError, match="toolkit"):
        cuda.compile_cubin("", "empty", "sm_90")
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda.find_nvcc() == str(program)


def test_missing_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setattr(
        sys, "modules", {k: v for k, v in sys.modules.items() if not k.startswith("pycuda")}
    )
    assert any("PyCUDA" in part for part in cuda.missing_parts())


def test_pycuda_is_not_imported_before_it_is_needed() -> None:
    script = (
        "import sys, cnnlib.device, cnnlib.device.cuda;"
        "assert not [name for name in sys.modules if name.startswith('pycuda')]"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=60)


@nvcc
@pytest.mark.parametrize("fixture", ["probe_source", "wrong_source"])
def test_kernels_compile_for_a_gpu(
    fixture: str, request: pytest.FixtureRequest, kernels_in: Callable[[str], list[str]]
) -> None:
    source = request.getfixturevalue(fixture)
    cubin = cuda.compile_cubin(source, f"{fixture}.cu", "sm_90")
    assert cubin[:4] == b"\x7fELF"
    for name in kernels_in(source):
        assert f".text.{name}".encode() in cubin


@nvcc
def test_cubins_are_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CNNLIB_CACHE", str(tmp_path))
    source = 'extern "C" __global__ void k(int* out) { *out = 1; }\n'
    first = cuda.compile_cubin(source, "k.cu", "sm_90")
    (entry,) = tmp_path.iterdir()
    written = entry.stat().st_mtime_ns
    assert cuda.compile_cubin(source, "k.cu", "sm_90") == first
    assert entry.stat().st_mtime_ns == written
    entry.write_bytes(entry.read_bytes()[:-100])
    assert cuda.compile_cubin(source, "k.cu", "sm_90")[:4] == b"\x7fELF"
    assert entry.stat().st_mtime_ns > written
    cuda.compile_cubin(source, "k.cu", "sm_90", ["-DOTHER"])
    assert len(list(tmp_path.iterdir())) == 2


@nvcc
def test_compile_error_names_module_and_line() -> None:
    source = '#include "portable.cuh"\n__global__ void k() { nothing_here(); }\n'
    with pytest.raises(DeviceError, match=r"module lenet.cu does not compile: .*lenet.cu.2.*error"):
        cuda.compile_cubin(source, "lenet.cu", "sm_90")


def test_only_one_file_imports_pycuda() -> None:
    package = Path(cuda.__file__).parents[1]
    importing = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        if "pycuda" in path.read_text() and "import" in path.read_text()
        for line in path.read_text().splitlines()
        if ("import" in line and "pycuda" in line and not line.lstrip().startswith(("#", '"')))
    ]
    assert set(importing) == {"device/cuda.py"}


def test_no_kernel_file_declares_plain_shared() -> None:
    for path in sorted(KERNELS.rglob("*.cuh")):
        if path.name != "portable.cuh":
            assert "__shared__" not in path.read_text(), path.name
