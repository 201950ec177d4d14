"""Programs that take long and that tests wait for, begun before the first test.

Most tests leave a core to spare.

A module registers what a fixture of its own waits for:

    @begins("finished")
    def begin(folder: Path) -> Program: ...

and the fixture takes it from the fixture `ahead`: ahead["finished"].end(). Nothing is begun that no
chosen test waits for. All begin before any test could put a limit on what is started.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TypeVar


class Program:
    """A program at work in `folder`; it yields to the tests where there are too few cores."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self._log = folder.parent / f"{folder.name}.log"
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                ["nice", "-n", "5", *command], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Wait for its exit code and all that it has printed."""
        return self._process.wait(), self._log.read_text()

    def stop(self) -> None:
        """End it and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


Begin = TypeVar("Begin", bound=Callable[[Path], Program])
_BEGINNINGS: dict[str, Callable[[Path], Program]] = {}


def begins(fixture: str) -> Callable[[Begin], Begin]:
    """Have this begin what the fixture of that name waits for, in a folder of its own."""

    def register(begin: Begin) -> Begin:
        _BEGINNINGS[fixture] = begin
        return begin

    return register


class Ahead(dict[str, Program]):
    """What was begun, by the name of the fixture that waits for it."""

    def begin(self, fixtures: Collection[str], folder: Path) -> None:
        for name, begin in _BEGINNINGS.items():
            if name in fixtures:
                place = folder / name
                place.mkdir()
                self[name] = begin(place)

    def stop(self) -> None:
        for program in self.values():
            program.stop()
