"""What all tests share: figures without a screen, `gpu` tests only where a GPU can be used, and
what makes them come out alike each time, on a busy machine too.
"""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from cnnlib.device import Device, limits_from, open_device
from cnnlib.measuring import telemetry
from tests.support.ahead import Ahead, begun_ahead, stop_all
from tests.support.order import longest_first

# Programs that tests start inherit these.
os.environ["MPLBACKEND"] = "Agg"
# Most emulated kernels of the tests run for less time than -O3 needs to compile them.
os.environ.setdefault("CNNLIB_OPTIMIZE", "1")
# A test starts Python dozens of times on the same modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The same inputs each time, however long they take.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")

# A reader that gets no core for a while has not died.
telemetry.PATIENCE = 60.0

SHARED = pytest.StashKey[Path]()
"""The folder of what all processes of the tests share."""


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist gives its workers what pytest_configure_node has put there.
    given: dict[str, Any] | None = getattr(config, "workerinput", None)
    config.stash[SHARED] = Path(given["shared"] if given else tempfile.mkdtemp(prefix="tests-"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["shared"] = str(node.config.stash[SHARED])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave all modules and tests out of later searches for garbage: they stay to the end.

    Each search would look through 400,000 of their objects, and took a tenth of the time in all.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)  # when those that are not chosen have gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given: dict[str, Any] | None = getattr(config, "workerinput", None)
    if given:
        items[:] = longest_first(items, given["workercount"], begun_ahead())


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        stop_all(config.stash[SHARED])
        shutil.rmtree(config.stash[SHARED], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        from cnnlib.device.cuda import missing_parts

        if missing := missing_parts():
            pytest.skip("; ".join(missing))


@pytest.fixture(autouse=True)
def same_folder() -> Iterator[None]:
    """No test leaves the process in another working directory, where later tests would fail."""
    before = Path.cwd()
    yield
    after = Path.cwd()
    os.chdir(before)
    assert after == before, "use monkeypatch.chdir, which goes back"


@pytest.fixture(scope="session", autouse=True)
def ahead(request: pytest.FixtureRequest) -> Ahead:
    """The long programs that the chosen tests wait for; they have begun."""
    fixtures = {name for item in request.session.items for name in item.fixturenames}
    return Ahead(fixtures, request.config.stash[SHARED])


@pytest.fixture(scope="session")
def optimized() -> Iterator[Device]:
    """A GPU where there is one, or else an emulated one."""
    with open_device("auto") as opened:
        yield opened


@pytest.fixture(scope="session")
def hasty(optimized: Device) -> Iterator[Device]:
    """The same, but that an emulated one compiles without optimisation."""
    if optimized.kind != "emulated":
        yield optimized
        return
    with pytest.MonkeyPatch.context() as patch:
        _hurry(patch)
        opened = open_device("emulated")
    with opened:
        yield opened


@pytest.fixture
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled without optimisation, in a fifth of the time, and run a third as fast.

    This is so of `device`, of devices that the test opens, and of programs that it starts.
    """
    _hurry(monkeypatch)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    """The device of a test."""
    which = "hasty" if "in_haste" in request.fixturenames else "optimized"
    found: Device = request.getfixturevalue(which)
    return found


def _hurry(patch: pytest.MonkeyPatch) -> None:
    if os.environ["CNNLIB_OPTIMIZE"] == "1":  # as set above, and not by the user
        patch.setenv("CNNLIB_OPTIMIZE", "0")


@pytest.fixture
def limited(device: Device) -> Iterator[Callable[..., Device]]:
    """A function that opens such a device with other limits: `limited(shared_bytes=90_000)`."""
    own = limits_from(device)
    with ExitStack() as opened:
        yield lambda **sizes: opened.enter_context(open_device(device.kind, own._replace(**sizes)))
