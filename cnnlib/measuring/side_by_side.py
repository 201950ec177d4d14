"""Several runs of a sweep prepared side by side, each in a process of its own, and timed alone."""

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


@dataclass
class Worker:
    """A process that measures one run after the other."""

    process: BaseProcess
    connection: Connection
    run: Run | None = None


def side_by_side(
    due: Sequence[Run], preparing: int, measure: Callable[[Run], str]
) -> Generator[tuple[Run, str], None, None]:
    """Call `measure` for each of the runs, `preparing` at a time, in processes of their own.

    Yields each run and what `measure` returned, as they finish; for one that ended its process,
    how it ended. They start in the order of `due`.
    """
    keep_compiled_code(cache_folder() / "peers", preparing)
    import_libraries(due)
    take_part(Turns(preparing))
    todo, workers = list(reversed(due)), list[Worker]()
    try:
        while todo or workers:
            while todo and len(workers) < preparing:
                workers.append(begin(measure))
                give(workers[-1], todo)
            wait([worker.connection for worker in workers])
            for worker in [each for each in workers if each.connection.poll()]:
                run = worker.run
                assert run is not None
                try:
                    said = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    said = f"its process ended with exit code {worker.process.exitcode}"
                    workers.remove(worker)
                else:
                    if not give(worker, todo):
                        workers.remove(worker)
                        worker.process.join()
                yield run, said
    finally:
        take_part(None)
        end(workers)


def begin(measure: Callable[[Run], str]) -> Worker:
    """Fork a process that has this one's data and libraries."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(ours, theirs, measure))
    process.start()
    theirs.close()
    return Worker(process, ours)


def work(ours: Connection, connection: Connection, measure: Callable[[Run], str]) -> None:
    """What a worker does, until it is given no further run or asked to stop."""
    die_with_parent()
    ours.close()
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
        while (run := connection.recv()) is not None:
            connection.send(measure(run))


def give(worker: Worker, todo: list[Run]) -> bool:
    """Give the worker the last of the runs to do; False if there is none, with which it ends."""
    worker.run = todo.pop() if todo else None
    with contextlib.suppress(OSError):  # it has died, as its connection will say
        worker.connection.send(worker.run)
    return worker.run is not None


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
