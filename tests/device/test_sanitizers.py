"""Kernels built with address and undefined-behaviour sanitizers: a wrong index is caught."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnnlib.device import sanitizer_environment
from cnnlib.device.compiler import sanitizers
from cnnlib.device.emulated import EmulatedDevice
from cnnlib.errors import DeviceError

HERE = Path(__file__).parent

PROGRAM = """
import sys
import numpy as np
from pathlib import Path
from cnnlib.device.emulated import EmulatedDevice

source, name, count, dtype, order = sys.argv[1:]
device = EmulatedDevice(order)
module = device.compile(Path(source).read_text(), "wrong.cu", [f"wrong_{name}"])
out = device.array(64, dtype)
arguments = [int(count)] if count else []
try:
    module.kernel(f"wrong_{name}")(3, 64, out, *arguments)
except Exception as error:
    print(type(error).__name__, error)
print(out.get()[:3].tolist())
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    try:
        found = sanitizer_environment()
    except DeviceError as error:
        pytest.skip(str(error))
    return {**os.environ, **found}


def run(
    environment: dict[str, str],
    name: str,
    count: int | str = "",
    dtype: str = "f4",
    order: str = "forward",
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(HERE / "wrong.cu"), name, str(count), dtype, order],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_right_kernels_pass(environment: dict[str, str], order: str) -> None:
    done = run(environment, "well_behaved", order=order)
    assert (done.returncode, done.stdout) == (0, "[2.0, 2.0, 2.0]\n"), done.stderr
    assert "Sanitizer" not in done.stderr


def test_abandoned_fibers_are_no_false_alarm(environment: dict[str, str]) -> None:
    done = run(environment, "some_end")
    assert done.returncode == 0, done.stderr
    assert "divergent barrier" in done.stdout


def test_overrun_of_a_shared_array(environment: dict[str, str]) -> None:
    inside = run(environment, "shared_overrun", 63)
    assert (inside.returncode, inside.stdout) == (0, "[1.0, 1.0, 1.0]\n"), inside.stderr
    done = run(environment, "shared_overrun", 64)
    assert done.returncode != 0
    # either sanitizer may see it first: the array has a length for one, a red zone for the other
    assert "AddressSanitizer" in done.stderr or "out of bounds" in done.stderr


def test_overrun_of_a_shared_array_by_address(environment: dict[str, str]) -> None:
    done = run({**environment, "CNNLIB_SANITIZE": "address"}, "shared_overrun", 64)
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr


def test_overrun_of_a_device_array(environment: dict[str, str]) -> None:
    done = run(environment, "array_overrun", 64)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    if "symbolize=0" not in environment["ASAN_OPTIONS"]:
        assert "wrong_array_overrun" in done.stderr


def test_undefined_behaviour(environment: dict[str, str]) -> None:
    done = run(environment, "signed_overflow", 2**31 - 1, "i4")
    assert done.returncode != 0
    assert "signed integer overflow" in done.stderr


def test_says_what_to_do_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer is loaded")
    monkeypatch.setenv("CNNLIB_SANITIZE", "address")
    with pytest.raises(DeviceError, match=r"python -m cnnlib\.device"):
        EmulatedDevice()


def test_unknown_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNLIB_SANITIZE", "address, memory")
    with pytest.raises(DeviceError, match=r"unknown sanitizer 'memory'.*known: address, undefined"):
        sanitizers()


def test_command_prints_the_environment(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cnnlib.device"],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    printed = dict(word.split("=", 1) for word in done.stdout.split())
    assert printed == {name: environment[name] for name in printed}
    assert printed["CNNLIB_SANITIZE"] == "address,undefined"
