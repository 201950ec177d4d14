"""Every header of kernels/ stands alone: it includes what it needs and compiles by itself."""

import subprocess
from pathlib import Path

import pytest

from cnnlib.device import cuda
from cnnlib.device.compiler import find_compiler
from cnnlib.paths import KERNELS

HEADERS = sorted(KERNELS.rglob("*.cuh"))

each_header = pytest.mark.parametrize(
    "header", HEADERS, ids=[str(path.relative_to(KERNELS)) for path in HEADERS]
)


@pytest.mark.quick
@each_header
def test_a_header_compiles_by_itself(header: Path) -> None:
    command = [*find_compiler().command, "-std=gnu++17", "-fsyntax-only", "-w", "-x", "c++", "-"]
    done = subprocess.run(
        [*command, "-I", str(KERNELS)],
        input=f'#include "{header}"\n',
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
@each_header
def test_a_header_compiles_by_itself_for_a_gpu(header: Path) -> None:
    assert cuda.compile_cubin(f'#include "{header.relative_to(KERNELS)}"\n', header.name, "sm_90")


@pytest.mark.quick
def test_a_header_that_lacks_an_include_is_found(tmp_path: Path) -> None:
    header = tmp_path / "lacking.cuh"
    header.write_text("inline int two() { return ceil_div(3, 2); }\n")
    with pytest.raises(AssertionError, match="ceil_div"):
        test_a_header_compiles_by_itself(header)
