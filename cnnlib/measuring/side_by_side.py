"""Several runs of a sweep prepared side by side, by processes of their own, and timed alone."""

import contextlib
import importlib
import multiprocessing
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from cnnlib.device.cache_folder import cache_folder
from cnnlib.measuring.cards import card_of
from cnnlib.measuring.runs import Run
from cnnlib.peers.compiled_code import keep_compiled_code
from cnnlib.system.interrupts import GRACE
from cnnlib.system.processes import die_with_parent
from cnnlib.system.turns import Turns, take_part

LIBRARIES = {"torch": ("torch",), "jax": ("jax", "jax.numpy")}
"""Beginning of a peer's name -> what its runs import, which takes seconds.

No more than that: importing PyTorch's compiler initialises CUDA, which then works in no process
that is forked.
"""


AHEAD = 1
"""Cells, networks at one batch size, that are begun before the first one is done."""

Cell = tuple[str, str, int]
"""Data set, network and batch size of runs that are compared with each other."""


def kin_of(stage: str) -> str:
    """The library of a peer, which its stages share in one process, or else the stage itself."""
    return next((name for name in LIBRARIES if stage.startswith(name)), stage)


def cell_of(run: Run) -> Cell:
    """The cell that the run belongs to."""
    return run.dataset, run.network, run.batch_size


@dataclass
class Worker:
    """A process that measures one run after the other."""

    process: BaseProcess
    connection: Connection
    run: Run | None = None
    """What it measures; None: it has to wait for a run that it may begin."""
    last: Run | None = None
    """The run before."""


class Order:
    """Which runs are due, in which order, and by whom.

    Runs that are compared with each other are measured at about the same time: all stages and
    repeats of one network and batch size, before the next but one is begun. The runs of one stage
    in a cell are measured one after the other by one worker, which goes on with that stage, or with
    another one of the same library.
    """

    def __init__(self, due: Sequence[Run]) -> None:
        self._cells: dict[Cell, list[Run]] = {}
        for run in due:
            self._cells.setdefault(cell_of(run), []).append(run)

    def take(self, worker: Worker, workers: Sequence[Worker]) -> Run | None:
        """The run that a worker is to measure next; None if there is none for it at present."""
        others = [each for each in workers if each is not worker]
        busy = [each.run for each in others if each.run]
        unfinished = {cell for cell, runs in self._cells.items() if runs} | {*map(cell_of, busy)}
        cells = list(self._cells)
        first = min((i for i, cell in enumerate(cells) if cell in unfinished), default=0)
        theirs = [each.last for each in others if each.last]  # their repeats are for them, too
        taken = {(cell_of(run), run.stage) for run in theirs}
        served = {kin_of(each.last.stage) for each in others if each.last}
        free = [
            run
            for cell in cells[first : first + 1 + AHEAD]
            for run in self._cells[cell]
            if (cell, run.stage) not in taken
        ]
        last = worker.last

        def preference(run: Run) -> tuple[int, bool]:
            if last and kin_of(run.stage) == kin_of(last.stage):
                return int(cell_of(run) != cell_of(last)), run.stage != last.stage
            return (3 if kin_of(run.stage) in served else 2), False

        found = min(free, key=preference, default=None)
        if found is not None:
            self._cells[cell_of(found)].remove(found)
        return found

    def __bool__(self) -> bool:
        """Whether any run is still to be begun."""
        return any(self._cells.values())


def side_by_side(
    due: Sequence[Run], preparing: int, work: Callable[[Connection], None]
) -> Generator[tuple[Run, str], None, None]:
    """Measure the runs in up to `preparing` processes at a time.

    In each of them `work` is called, which receives one run after the other, and at last None, and
    sends for each what is to be said of it. Yields each run and what was said, as they finish; for
    one that ended its process, how it ended.
    """
    keep_compiled_code(cache_folder() / "peers", preparing)
    import_libraries(due)
    take_part(Turns(preparing))
    order, workers = Order(due), list[Worker]()
    try:
        while order or any(worker.run for worker in workers):
            while order and len(workers) < preparing:
                workers.append(begin(work))
            for worker in workers:
                if worker.run is None:
                    give(worker, order.take(worker, workers))
            given = [worker for worker in workers if worker.run]
            assert given, "there are runs to begin, and none that any process may begin"
            wait([worker.connection for worker in given])
            for worker in [each for each in given if each.connection.poll()]:
                run = worker.run
                assert run is not None
                worker.run = None
                try:
                    said = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    said = f"its process ended with exit code {worker.process.exitcode}"
                    workers.remove(worker)
                yield run, said
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
        for worker in workers:
            worker.process.join(GRACE)
    finally:
        take_part(None)
        end(workers)


def begin(work: Callable[[Connection], None]) -> Worker:
    """Fork a process that has this one's data and libraries."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=work_until_the_end, args=(ours, theirs, work))
    process.start()
    theirs.close()
    return Worker(process, ours)


def work_until_the_end(
    ours: Connection, connection: Connection, work: Callable[[Connection], None]
) -> None:
    """What a worker does, until it is given no further run or asked to stop."""
    die_with_parent()
    ours.close()
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
        work(connection)


def give(worker: Worker, run: Run | None) -> None:
    """Give the worker a run, if there is one for it."""
    if run is None:
        return
    worker.run = worker.last = run
    with contextlib.suppress(OSError):  # it has died, as its connection will say
        worker.connection.send(run)


def end(workers: Sequence[Worker]) -> None:
    """End workers that are still there; each of them ends its run first."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(2 * GRACE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def import_libraries(due: Sequence[Run]) -> None:
    """Import what the runs' peers need, once for all of them.

    A library that begins threads is left to the runs: a process with threads must not be forked.
    None of these uses a GPU before it is asked to.
    """
    names = {card_of(run.stage, "sweep.stages").name for run in due}
    for beginning, modules in LIBRARIES.items():
        if any(name.startswith(beginning) for name in names) and threading.active_count() == 1:
            for module in modules:
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)
