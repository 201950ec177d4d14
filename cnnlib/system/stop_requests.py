"""Requests to stop that reach a process while it waits for a supervised call."""

import contextlib
import math
import os
import select
import signal
import threading
import time
from types import FrameType
from typing import Any

from cnnlib.system.interrupts import GRACE, SIGNALS
from cnnlib.system.processes import send
from cnnlib.system.shared_page import Page

REQUESTS = (*SIGNALS, signal.SIGINT)
"""Signals by which a person or a scheduler asks a run to stop."""

SETTLE = 0.3
"""Seconds to wait for a request that was sent to both processes and ended the supervised one."""


class StopRequests:
    """A context in which requests to stop are remembered and passed on to the forked process."""

    def __init__(self, patient: bool) -> None:
        self.last = 0
        self._patient = patient
        self._child = 0
        self._deadline = math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # The signals are held back until both processes have their handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        if threading.current_thread() is threading.main_thread():
            for number in REQUESTS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
        os.close(self._wake)
        os.close(self._woken)

    def note_in(self, page: Page, own: int) -> None:
        """Used in the forked process: note a request in the page and raise an exception."""

        def asked(number: int, frame: FrameType | None) -> None:
            if os.getpid() == own:
                if sends_signals(frame):
                    raise SystemExit(f"sent itself {signal.Signals(number).name}")
                page.request = number
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)

        for number in self._before:
            signal.signal(number, asked)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    def pass_on_to(self, child: int) -> None:
        """Pass requests on to process `child` from now on; 0 stands for none."""
        self._child = child
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not self._patient or self.last:
            self._deadline = min(self._deadline, time.monotonic() + GRACE)
        self.last = number
        if self._child:
            send(self._child, number)
        with contextlib.suppress(OSError):
            os.write(self._woken, b"!")

    def wait(self, deadline: float) -> bool:
        """Whether the process ends before `deadline` and within GRACE of a request."""
        try:
            ends: list[int] = [os.pidfd_open(self._child)]
        except (OSError, AttributeError):  # an old kernel: look now and then
            ends = []
        try:
            while True:
                if os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return True
                left = min(deadline, self._deadline) - time.monotonic()
                if left <= 0:
                    return False
                select.select([self._wake, *ends], [], [], min(left, 3600.0 if ends else 0.05))
                with contextlib.suppress(OSError):
                    os.read(self._wake, 64)
        finally:
            for end in ends:
                os.close(end)

    def settle(self) -> None:
        """Give a request that was sent to both processes time to reach this one too."""
        if not self.last:
            select.select([self._wake], [], [], SETTLE)

    def obey(self, number: int) -> None:
        """Do what the signal would have done without a supervised call, which usually raises."""
        handler = self._before.get(number, signal.getsignal(number))
        if callable(handler):
            handler(number, None)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def sends_signals(frame: FrameType | None) -> bool:
    """Whether the code in this frame has probably sent the signal that interrupts it.

    When a process sends itself a signal, Python runs the handler before `os.kill` returns. A
    handler in Python does not learn who sent the signal, so the names that the code uses decide.
    """
    names = {"kill", "killpg", "raise_signal", "pthread_kill"}
    return frame is not None and bool(names & set(frame.f_code.co_names))
