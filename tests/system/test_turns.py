"""Processes that take turns: who is alone really is, and who ends lets go."""

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from cnnlib.system.supervisor import Died, supervise
from cnnlib.system.turns import Turn, Turns, alone, take_part, take_turn, turns, untimed

FORK = get_context("fork")


def spend(turn: Turn, log: Path, seconds: float = 0.01) -> None:
    """Take a turn and write down when it began and ended."""
    take_turn(turn)
    began = time.monotonic()
    time.sleep(seconds)
    with open(log, "a") as file:  # one short write, so that lines stay whole
        file.write(f"{turn} {os.getpid()} {began} {time.monotonic()}\n")


def overlaps(log: Path) -> tuple[list[str], list[str]]:
    """Pairs of kinds of turns of two processes that had them at the same time.

    The first list has those in which one was alone.
    """
    turns = [line.split() for line in log.read_text().splitlines()]
    pairs = [
        f"{a[0]} {b[0]}"
        for i, a in enumerate(turns)
        for b in turns[:i]
        if a[1] != b[1] and float(a[2]) < float(b[3]) and float(b[2]) < float(a[3])
    ]
    return [pair for pair in pairs if "alone" in pair], [p for p in pairs if "alone" not in p]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Turns]:
    made = Turns(4)
    monkeypatch.setattr("cnnlib.system.turns._turns", made)
    yield made
    made.take("away")


def test_who_is_alone_is_alone_and_others_prepare_together(shared: Turns, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def work() -> None:
        for _ in range(6):
            spend("preparing", log)
            with alone():
                spend("alone", log, 0.003)
            spend("preparing", log)
            spend("alone", log, 0.003)
        take_turn("away")

    processes = [FORK.Process(daemon=True, target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    wrong, right = overlaps(log)
    assert not wrong
    assert right
    assert len(log.read_text().splitlines()) == 4 * 24


def test_one_that_wants_to_be_alone_goes_before_those_that_want_to_prepare(
    shared: Turns, tmp_path: Path
) -> None:
    log, began = tmp_path / "log", FORK.Event()
    shared.take("preparing")

    def wants_to_be_alone() -> None:
        began.set()
        spend("alone", log, 0.05)

    first = FORK.Process(daemon=True, target=wants_to_be_alone)
    first.start()
    began.wait()
    time.sleep(0.1)
    second = FORK.Process(daemon=True, target=lambda: spend("preparing", log))
    second.start()
    time.sleep(0.1)
    assert not log.exists()  # one waits for this process, the other for the one before it
    shared.take("away")
    for process in (first, second):
        process.join(120)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["alone", "preparing"]


@pytest.mark.parametrize("turn", ["preparing", "alone"])
def test_a_process_that_dies_lets_go(shared: Turns, turn: Turn) -> None:
    there = FORK.Event()

    def hang() -> None:
        take_turn(turn)
        if not os.fork():  # a child of its own holds nothing
            time.sleep(12)
            os._exit(0)
        there.set()
        time.sleep(60)

    process = FORK.Process(daemon=True, target=hang)
    process.start()
    there.wait()
    os.kill(process.pid or 0, signal.SIGKILL)
    began = time.monotonic()
    shared.take("alone")
    assert time.monotonic() - began < 10
    shared.take("away")
    process.join()


def test_what_is_untimed_waits_for_nothing(shared: Turns) -> None:
    shared.take("preparing")
    there = FORK.Event()

    def prepare() -> None:
        take_turn("preparing")
        with untimed(), alone():
            there.set()

    process = FORK.Process(daemon=True, target=prepare)
    process.start()
    assert there.wait(120)
    process.join()
    with alone():
        pass
    shared.take("away")


def test_without_turns_nothing_waits() -> None:
    take_part(None)
    assert turns() is None
    take_turn("alone")
    with alone(), untimed():
        take_turn("preparing")


def test_waiting_does_not_count_towards_a_limit(shared: Turns) -> None:
    """A run that waits for a long one is not hung, but one that hangs after it has waited is."""
    held, go = FORK.Event(), FORK.Event()

    def hold() -> None:
        take_turn("alone")
        held.set()
        go.wait()
        time.sleep(2.5)

    def wait() -> str:
        go.set()
        take_turn("preparing")
        return "waited"

    def hang() -> None:
        wait()
        time.sleep(60)

    for call in (wait, hang):
        process = FORK.Process(daemon=True, target=hold)
        process.start()
        held.wait()
        began = time.monotonic()
        if call is wait:
            assert supervise(wait, limit=2) == "waited"
        else:
            with pytest.raises(Died, match="hangs"):
                supervise(hang, limit=2)
        assert 2 < time.monotonic() - began < 60
        process.join()
        held.clear()
        go.clear()
