"""What all tests share: figures without a screen, and `gpu` tests only where a GPU can be used."""

import os
from collections.abc import Iterator

import pytest

from cnnlib.device import Device, open_device

os.environ["MPLBACKEND"] = "Agg"  # programs that tests start inherit it


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        from cnnlib.device.cuda import missing_parts

        if missing := missing_parts():
            pytest.skip("; ".join(missing))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A GPU where there is one, or else the host; with the modules that the chosen tests need."""
    from engines import compile_for

    pairs = {}
    for item in request.session.items:
        values = getattr(item, "callspec", None) and item.callspec.params
        if values and "device" in item.fixturenames and {"stage", "network"} <= values.keys():
            stage, network = values["stage"], values["network"]
            pairs[stage.name, network.name] = stage, network
    with open_device("auto") as opened:
        compile_for(opened, pairs.values())
        yield opened
