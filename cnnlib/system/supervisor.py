"""Calls made in a process of their own, so that nothing they do can end the caller.

A stage is a user's code and the libraries that it calls: it may crash, leave by `os._exit`, hang
with Python's lock held, or kill its whole process group. `supervise` forks a process in which the
call is made, waits, and either returns the call's result or says how the process ended.
"""

import contextlib
import faulthandler
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, TypeVar

from cnnlib.errors import UserError
from cnnlib.system.interrupts import Stopped
from cnnlib.system.processes import (
    adopting_orphans,
    children,
    die_with_parent,
    end_with_leftovers,
    how_it_ended,
    memory_shortages,
    send,
)
from cnnlib.system.shared_page import Page, can_be_passed
from cnnlib.system.stop_requests import StopRequests
from cnnlib.system.traces import place_in, place_of, read_trace, trace_file

T = TypeVar("T")

TRAVELLING = (UserError, OSError, MemoryError, Stopped)
"""Exceptions that are raised again in the caller, which of all others receives the text."""

EXPLAIN = 5.0
"""Seconds that a hanging process has at most to begin to write its traceback."""

WRITE = 0.3
"""Seconds that it has to finish its traceback."""

DOING = {
    "open": "opening its device",
    "wait": "waiting until it can be timed alone",
    "validate": "validating",
    "warm_up": "warming up",
    "train": "training",
    "evaluate": "evaluating",
    "profile": "profiling",
    "learn": "recording what it learns",
    "sustain": "training for its energy",
    "confirm": "confirming that no call returned early",
    "close": "closing",
}
"""What a run does in each of its phases (cnnlib.measuring.telemetry.Telemetry.phase)."""


class Died(Exception):
    """A supervised call did not finish; the message says in one line how it ended.

    `kind` is "raised" for an exception (SystemExit included), "hung" when the time limit was
    reached and "died" when the process ended. `notes` holds what the call had noted, `trace` the
    Python traceback if there is one.
    """

    def __init__(
        self,
        message: str,
        kind: Literal["raised", "hung", "died"],
        notes: dict[str, str],
        trace: str = "",
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.kind, self.notes, self.trace = kind, notes, trace


_page: Page | None = None


def supervised() -> bool:
    """Whether this process was forked by `supervise`, which then also limits its time."""
    return _page is not None


def note(**facts: str) -> None:
    """Record what is being done (`phase`, `device`, ...), in case the process ends in the middle.

    This takes some ten microseconds, and does nothing in a process that is not supervised.
    """
    if _page is not None:
        _page.note(**facts)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """A context in which the call waits for other processes, which is not of its limited time."""
    page = _page
    if page is not None:
        page.wait(time.monotonic())
    try:
        yield
    finally:
        if page is not None:
            page.go_on(time.monotonic())


def begin_anew() -> None:
    """From now on the supervised call may take as long as it might have at its beginning."""
    if _page is not None:
        _page.begin_anew(time.monotonic())


def supervise(call: Callable[[], T], *, limit: float = math.inf, patient: bool = False) -> T:
    """Make the call in a process forked from this one and return its result.

    The result must not exceed CAPACITY when pickled. Raises Died when the call takes longer than
    `limit` seconds, beside those of `waiting` and before `begin_anew`, raises an exception or ends
    its process; a UserError, OSError, MemoryError or Stopped that it raises is raised here too.
    Before `supervise` ends, it ends every process that the call has started.

    SIGTERM, SIGUSR1 and SIGINT are passed on. A call that is still running GRACE seconds later is
    killed, and then the signal has the effect that it would have had without the call. With
    `patient` the first signal sets no such deadline, and a call that finishes after it counts. A
    signal that is sent to the forked process alone has the same effect.

    CUDA must not have been initialised in the calling process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    page, before, shortages = Page(), children(), memory_shortages()
    with (
        contextlib.closing(page),
        trace_file() as trace,
        adopting_orphans(),
        StopRequests(patient) as requests,
    ):
        parent = os.getpid()
        child = os.fork()
        if not child:
            _serve(call, page, trace, parent, requests)
        requests.pass_on_to(child)
        ends = time.monotonic() + limit
        hung = not requests.wait(ends)
        while hung and not requests.last and ends + page.waited(now := time.monotonic()) > now:
            hung = not requests.wait(ends + page.waited(now))
        if hung and not requests.last:
            send(child, signal.SIGUSR2)  # faulthandler says where
            ends = time.monotonic() + EXPLAIN
            while not os.fstat(trace.fileno()).st_size and time.monotonic() < ends:
                requests.wait(time.monotonic() + 0.02)
            requests.wait(time.monotonic() + WRITE)
        status = end_with_leftovers(child, before)
        requests.pass_on_to(0)
        outcome = page.get()
        if outcome is None or outcome[0] == "failed":
            requests.settle()
        asked = requests.last or page.request
        said, notes = read_trace(trace), page.notes
    if hung and not asked:
        raise Died(f"hangs{where(place_in(said), notes)}", "hung", notes, said)
    if outcome is not None and outcome[0] == "returned":
        if asked and not patient:
            requests.obey(asked)
        value: T = outcome[1]
        return value
    if outcome is not None and isinstance(outcome[1], Stopped):
        raise outcome[1]
    if asked:
        requests.obey(asked)
    if outcome is not None and outcome[0] == "raised":
        raise outcome[1]
    if outcome is not None:
        text, place, trace_text = outcome[1]
        place = where(place, notes)
        comma = "," if place.startswith(" in ") else ""
        raise Died(f"{text}{comma}{place}", "raised", notes, trace_text)
    place = where(place_in(said), notes)
    how = how_it_ended(status)
    if memory_shortages() > shortages and os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
        place += "; the system had no memory left"
    raise Died(how + place, "died", notes, said)


def where(place: str, notes: dict[str, str]) -> str:
    """As much as is known of ` while training, in forward of cnnlib/stages/mine.py:12`."""
    phase = notes.get("phase")
    doing = f" while {DOING.get(phase, phase)}" if phase else ""
    return doing + (f"{',' if doing else ''} in {place}" if place else "")


def _serve(
    call: Callable[[], Any], page: Page, trace: IO[bytes], parent: int, requests: "StopRequests"
) -> NoReturn:
    """Make the call, leave its outcome in the page and end this process, whatever happens."""
    global _page
    own, code = os.getpid(), 1
    try:
        os.setsid()  # signals that the call sends to its own process group stay within it
        die_with_parent()
        if os.getppid() != parent:
            os._exit(code)
        with contextlib.suppress(OSError):  # so that the kernel spares the caller
            Path("/proc/self/oom_score_adj").write_text("500")
        _page = page
        faulthandler.enable(file=trace, all_threads=False)
        faulthandler.register(signal.SIGUSR2, file=trace, all_threads=False)
        outcome: tuple[str, Any] | None
        try:
            requests.note_in(page, own)  # from here on a request raises an exception
            outcome = "returned", call()
        except BaseException as error:
            outcome = None if page.request else _raised(error)
        # a stage may have forked, and its copy may have come this far
        if outcome is not None and os.getpid() == own:
            page.put(outcome)
            code = 0
    except BaseException:
        if not page.request:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(code)


def _raised(error: BaseException) -> tuple[str, Any]:
    """The exception itself if it can be passed on, or else its text, place and traceback."""
    if isinstance(error, TRAVELLING) and can_be_passed(error):
        return "raised", error
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    return "failed", (text, place_of(error.__traceback__), trace)
