"""Programs begun before the tests: once, whichever of the tests' processes comes first."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ahead
from tests.support.ahead import Ahead, Program, stop_all

pytestmark = pytest.mark.quick

QUICK = "print('done'); raise SystemExit(3)"
LONG = "import time; print('begun', flush=True); time.sleep(600)"


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which two programs are begun; the second would not end."""

    def program(text: str) -> Callable[[Path], Program]:
        return lambda folder: Program([sys.executable, "-c", text], folder, dict(os.environ))

    beginnings = {"quick": program(QUICK), "long": program(LONG), "other": program(LONG)}
    monkeypatch.setattr(ahead, "_BEGINNINGS", beginnings)
    return tmp_path


def processes(begun: Ahead) -> dict[str, int]:
    return {name: program._process for name, program in begun.items()}


def test_what_one_process_has_begun_the_others_find(shared: Path) -> None:
    first = Ahead({"quick", "unknown"}, shared)
    second = Ahead({"quick"}, shared)
    assert first.keys() == {"quick"}, "nothing that no test waits for"
    assert processes(first) == processes(second)
    assert first["quick"].folder == second["quick"].folder == shared / "quick"
    for begun in (second, first):
        assert begun["quick"].end() == (3, "done\n")


def test_at_the_end_all_are_stopped(shared: Path) -> None:
    begun = Ahead({"quick", "long"}, shared)
    begun["quick"].end()
    while not (shared / "long.log").read_text():
        time.sleep(0.01)
    stop_all(shared)
    with pytest.raises(AssertionError, match="long: killed\nbegun"):
        begun["long"].end()
    stop_all(shared)  # of those that have ended, too


def test_a_program_that_is_killed_is_not_waited_for(shared: Path) -> None:
    begun = Ahead({"long"}, shared)
    os.killpg(begun["long"]._process, signal.SIGKILL)
    with pytest.raises(AssertionError, match="long: killed"):
        Ahead({"long"}, shared)["long"].end()
