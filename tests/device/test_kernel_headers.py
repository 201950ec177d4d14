"""Every header of kernels/ stands alone: it includes what it needs and compiles by itself."""

import subprocess
from pathlib import Path

import pytest

from cnnlib.device.compiler import find_compiler
from cnnlib.paths import KERNELS

pytestmark = pytest.mark.quick

HEADERS = sorted(KERNELS.rglob("*.cuh"))


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: str(path.relative_to(KERNELS)))
def test_a_header_compiles_by_itself(header: Path) -> None:
    command = [*find_compiler().command, "-std=gnu++17", "-fsyntax-only", "-w", "-x", "c++", "-"]
    done = subprocess.run(
        [*command, "-I", str(KERNELS)],
        input=f'#include "{header.relative_to(KERNELS)}"\n',
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
