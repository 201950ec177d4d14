"""Programs that take long and that tests wait for, begun before the first test.

A module registers what a fixture of its own waits for:

    @begins("finished")
    def begin(folder: Path) -> Program: ...

and the fixture takes it from the fixture `ahead`: ahead["finished"].end(). Nothing is begun that no
chosen test waits for. All begin before any test could put a limit on what is started.

The processes among which pytest-xdist shares out the tests have these programs in common: the first
of them to come begins them all, the others find them at work, and the process that shares out the
tests ends what is left of them.
"""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

# Leaves the exit code in a file, which appears whole. The tests' processes, which wait for it, may
# not be the one that has begun the program.
WRAPPED = '"$@"; echo $? >"$0.part"; mv "$0.part" "$0"'


class Program(NamedTuple):
    """What is to run, and in which folder."""

    command: list[str]
    folder: Path
    env: dict[str, str]


# Kept, because Python complains of processes that live longer than their Popen objects.
_STARTED: list[subprocess.Popen[bytes]] = []


class Begun:
    """A program at work in `folder`; it yields to the tests where there are too few cores."""

    def __init__(self, record: Path) -> None:
        facts = json.loads(record.read_text())
        self.folder = Path(facts["folder"])
        self._process: int = facts["process"]
        self._log, self._code = record.with_suffix(".log"), record.with_suffix(".code")

    @classmethod
    def begin(cls, program: Program, record: Path) -> "Begun":
        """Start it; `record` is written for other processes of the tests."""
        code = record.with_suffix(".code")
        with record.with_suffix(".log").open("w") as out:
            process = subprocess.Popen(
                ["nice", "-n", "5", "sh", "-c", WRAPPED, str(code), *program.command],
                cwd=program.folder,
                env=program.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _STARTED.append(process)
        record.write_text(json.dumps({"folder": str(program.folder), "process": process.pid}))
        return cls(record)

    def end(self) -> tuple[int, str]:
        """Wait for its exit code and all that it has printed."""
        while not self._code.exists():
            assert self._lives(), f"{self.folder}: killed\n{self._log.read_text()}"
            time.sleep(0.05)
        return int(self._code.read_text()), self._log.read_text()

    def _lives(self) -> bool:
        if self._code.exists():
            return True
        for process in _STARTED:
            process.poll()  # one that has ended is there until its parent has asked
        try:
            os.kill(self._process, 0)
        except ProcessLookupError:
            return self._code.exists()
        return True

    def stop(self) -> None:
        """End it and all that it has started, unless it has ended by itself."""
        if not self._code.exists():
            with suppress(ProcessLookupError):
                os.killpg(self._process, signal.SIGKILL)


Begin = TypeVar("Begin", bound=Callable[[Path], Program])
_BEGINNINGS: dict[str, Callable[[Path], Program]] = {}


def begins(fixture: str) -> Callable[[Begin], Begin]:
    """Have what this gives begun for the fixture of that name, in a folder of its own."""

    def register(begin: Begin) -> Begin:
        _BEGINNINGS[fixture] = begin
        return begin

    return register


def begun_ahead() -> frozenset[str]:
    """The fixtures that wait for such a program."""
    return frozenset(_BEGINNINGS)


class Ahead(dict[str, Begun]):
    """What was begun in `shared`, by the name of the fixture that waits for it."""

    def __init__(self, fixtures: Collection[str], shared: Path) -> None:
        with open(shared / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name, begin in _BEGINNINGS.items():
                if name in fixtures:
                    record = shared / f"{name}.json"
                    if record.exists():
                        self[name] = Begun(record)
                    else:
                        (shared / name).mkdir()
                        self[name] = Begun.begin(begin(shared / name), record)


def stop_all(shared: Path) -> None:
    """End what any process of the tests has begun there."""
    for record in shared.glob("*.json"):
        Begun(record).stop()
