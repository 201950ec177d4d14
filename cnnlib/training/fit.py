"""A training that goes on as its epochs are asked for."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from cnnlib.system.interrupts import asked_to_stop
from cnnlib.training.records import EpochRecord


class Fit(Iterator[EpochRecord]):
    """The epochs of one call of `Trainer.fit`: each is trained when the iterator gets to it.

    `list(fit)` trains them all. Leaving a loop early ends the training there. One that is dropped
    before its first epoch was asked for has trained nothing, and warns.
    """

    def __init__(self, epochs: Iterator[EpochRecord], count: int) -> None:
        self._epochs, self._count = epochs, count
        self._begun = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EpochRecord:
        self._begun = True
        return next(self._epochs)

    def __repr__(self) -> str:
        return f"<training of {self._count} epochs: iterate over it, or list() it, to train>"

    def __del__(self) -> None:
        if not getattr(self, "_begun", True):
            warnings.warn(
                "nothing was trained: fit(...) trains as it is iterated over; "
                "write `for epoch in trainer.fit(...)` or `list(trainer.fit(...))`",
                stacklevel=2,
            )


@contextmanager
def interrupt_noted() -> Iterator[Callable[[], int]]:
    """Note a first Ctrl-C within the context, so that a step is not left half done.

    Yields a function that says whether there was one. A second Ctrl-C interrupts at once. Where
    Ctrl-C does not reach this code (another thread, a handler of the program's own) nothing
    changes.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    with asked_to_stop([signal.SIGINT]) as asked:
        yield asked
