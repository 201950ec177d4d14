"""Devices for the tests: each that this machine has, a visible skip for each it has not."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnnlib.device import Device, Kernel, open_device
from cnnlib.device.cuda import missing_parts

HERE = Path(__file__).parent


def entries(source: str) -> list[str]:
    """The names of the kernels that a source defines."""
    found = re.findall(r"^ENTRY_POINT\w*\((\w+), (\w+)", source, re.MULTILINE)
    assert found
    return [f"{layer}_{name}" for layer, name in found]


@pytest.fixture(scope="session")
def probe_source() -> str:
    return (HERE / "probe.cu").read_text()


@pytest.fixture(scope="session")
def wrong_source() -> str:
    return (HERE / "wrong.cu").read_text()


@pytest.fixture(scope="session")
def kernels_in() -> Callable[[str], list[str]]:
    return entries


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "cuda" and (missing := missing_parts()):
        pytest.skip("; ".join(missing))
    with open_device(request.param) as opened:
        yield opened


@pytest.fixture(scope="session")
def probe(device: Device, probe_source: str) -> Callable[[str], Kernel]:
    module = device.compile(probe_source, "probe.cu", entries(probe_source))
    return lambda name: module.kernel(f"probe_{name}")
