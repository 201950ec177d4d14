"""What all tests share: figures without a screen, `gpu` tests only where a GPU can be used, and
what makes them come out alike each time, on a busy machine too.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

from cnnlib import sampling
from cnnlib.device import Device, open_device
from tests.ahead import Ahead

if TYPE_CHECKING:
    from engines import Builder

os.environ["MPLBACKEND"] = "Agg"  # programs that tests start inherit it

# The same inputs each time, however long they take.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")

# A reader that gets no core for a while has not died.
sampling.PATIENCE = 60.0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        from cnnlib.device.cuda import missing_parts

        if missing := missing_parts():
            pytest.skip("; ".join(missing))


@pytest.fixture(scope="session", autouse=True)
def ahead(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ahead]:
    """The long programs that the chosen tests wait for; they have begun."""
    fixtures = {name for item in request.session.items for name in item.fixturenames}
    begun = Ahead()
    try:
        begun.begin(fixtures, tmp_path_factory.mktemp("ahead"))
        yield begun
    finally:
        begun.stop()


@pytest.fixture(scope="session")
def builder(request: pytest.FixtureRequest) -> "Iterator[Builder]":
    """Compiles what the chosen tests need while the first of them run."""
    from engines import Builder

    with open_device("auto") as opened, Builder(opened) as builds:
        for item in request.session.items:
            builds.begin(item)
        yield builds


@pytest.fixture
def device(request: pytest.FixtureRequest, builder: "Builder") -> Device:
    """A GPU where there is one, or else the host; with the test's stage on its network compiled."""
    builder.wait_for(request.node)
    return builder.device
