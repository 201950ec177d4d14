"""Asking a long run to stop: a scheduler's SIGTERM or SIGUSR1, then some time to save itself."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """A training was asked to stop and did so after a whole block of work.

    `number` is the signal's; `saved` says whether there is a checkpoint to go on from.
    """

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.saved = number, saved


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], int]]:
    """Within it a first signal is only noted; the function given tells its number, or 0.

    A second one does what it would have done before.
    """
    asked = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        for each in SIGNALS:
            signal.signal(each, before[each])

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
