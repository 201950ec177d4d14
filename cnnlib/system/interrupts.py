"""How runs end early: at a scheduler's SIGTERM or SIGUSR1, and at a time limit."""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE = 5.0
"""Seconds after which a process that can no longer run Python is killed."""

STDERR = 2
"""The descriptor to which tracebacks go, whatever sys.stderr is."""


class Stopped(Exception):
    """A training was asked to stop and did so after a whole chunk of work.

    `number` is the signal's; `saved` says whether there is a checkpoint from which it can resume.
    """

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.saved = number, saved

    def __reduce__(self) -> tuple[type["Stopped"], tuple[int, bool]]:
        return Stopped, (self.number, self.saved)


@contextmanager
def asked_to_stop(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[Callable[[], int]]:
    """Note a first one of `signals` within the context instead of obeying it.

    Yields a function that returns the signal's number, or 0 if there was none. A second signal has
    the effect that it would have had outside the context.
    """
    asked = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        for each in signals:
            signal.signal(each, before[each])

    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number in signals:
            signal.signal(number, before[number])


@contextmanager
def time_limit(seconds: float, hung: Callable[[], int]) -> Iterator[None]:
    """End the process if the body of the context takes longer than `seconds`.

    Every thread's traceback goes to standard error, and the exit code is what `hung` returns. It is
    1 where the process hangs in a library that keeps Python's lock, so that `hung` cannot be
    called.
    """

    def end() -> None:
        faulthandler.dump_traceback(STDERR)
        os._exit(hung())

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=STDERR)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
