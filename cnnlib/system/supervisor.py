"""Calls made in a process of their own, so that nothing they do can end the caller.

A stage is a user's code and the libraries that it calls: it may crash, leave by `os._exit`, hang
with Python's lock held, or kill its whole process group. `supervise` forks a process in which the
call is made, waits, and either returns the call's result or says how the process ended.

The two processes share a page of memory rather than a pipe: what stands there survives the death
of its writer, needs no open file, and cannot be held open by processes that the call has started.
"""

import contextlib
import ctypes
import faulthandler
import json
import math
import mmap
import os
import pickle
import re
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Literal, NoReturn, TypeVar

from cnnlib.errors import UserError
from cnnlib.paths import ROOT
from cnnlib.system.interrupts import GRACE, SIGNALS, Stopped

T = TypeVar("T")

REQUESTS = (*SIGNALS, signal.SIGINT)
"""Signals by which a person or a scheduler asks a run to stop."""

TRAVELLING = (UserError, OSError, MemoryError, Stopped)
"""Exceptions that are raised again in the caller; of all others it gets the text."""

SETTLE = 0.3
"""Seconds to wait for a request that was sent to both processes and ended the supervised one."""

EXPLAIN = 0.3
"""Seconds for a hanging process to write its traceback."""

LEFTOVERS = 5.0
"""Seconds after which killing the processes that a call has left behind is given up."""

CAPACITY = 1 << 20
"""Size of the shared page in bytes, which bounds the result of a call."""

DOING = {
    "open": "opening its device",
    "validate": "validating",
    "warm_up": "warming up",
    "train": "training",
    "evaluate": "evaluating",
    "profile": "profiling",
    "learn": "recording what it learns",
    "sustain": "training for its energy",
    "close": "closing",
}
"""What a run does in each of its phases (cnnlib.measuring.telemetry.Sampler.phase)."""

LINUX = sys.platform.startswith("linux")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


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
        notes: dict[str, Any],
        trace: str = "",
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.kind, self.notes, self.trace = kind, notes, trace


class Page:
    """Memory shared by caller and call: notes, the number of a request, and the outcome.

    Notes lie in two slots, one of which is valid, so that a writer that dies halfway destroys none.
    """

    NOTES = 4096
    OUTCOME = 2 * NOTES

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, CAPACITY)
        self._notes: dict[str, Any] = {}

    def note(self, **facts: Any) -> None:
        self._notes |= facts
        text = json.dumps(self._notes).encode()
        slot = 1 - self._memory[0]
        begin = slot * self.NOTES + 8
        if begin + len(text) < (slot + 1) * self.NOTES:
            self._memory[begin : begin + len(text) + 1] = text + b"\0"
            self._memory[0] = slot

    @property
    def notes(self) -> dict[str, Any]:
        begin = self._memory[0] * self.NOTES + 8
        text = self._memory[begin : self._memory.find(b"\0", begin)]
        with contextlib.suppress(ValueError):  # a stage may have written anywhere
            return dict(json.loads(text)) if text else {}
        return {}

    @property
    def request(self) -> int:
        """The signal that has asked the call to stop, or 0."""
        return self._memory[1]

    @request.setter
    def request(self, number: int) -> None:
        self._memory[1] = number

    def put(self, outcome: tuple[str, Any]) -> None:
        data = pickle.dumps(outcome)
        begin = self.OUTCOME + 8
        self._memory[begin : begin + len(data)] = data
        self._memory[self.OUTCOME : begin] = len(data).to_bytes(8, "little")  # now it is whole

    def get(self) -> tuple[str, Any] | None:
        """How the call finished, or None if it did not."""
        begin = self.OUTCOME + 8
        size = int.from_bytes(self._memory[self.OUTCOME : begin], "little")
        if not size:
            return None
        with contextlib.suppress(Exception):
            kind, value = pickle.loads(self._memory[begin : begin + size])
            return kind, value
        return None

    def close(self) -> None:
        self._memory.close()


_page: Page | None = None


def supervised() -> bool:
    """Whether this process was forked by `supervise`, which then also limits its time."""
    return _page is not None


def note(**facts: Any) -> None:
    """Record what is being done (`phase`, `device`, ...), in case the process ends in the middle.

    Takes some ten microseconds, and does nothing in a process that is not supervised.
    """
    if _page is not None:
        _page.note(**facts)


def supervise(call: Callable[[], T], *, limit: float = math.inf, patient: bool = False) -> T:
    """Make the call in a process forked from this one and return its result.

    The result must not exceed CAPACITY when pickled. Raises Died when the call takes longer than
    `limit` seconds, raises an exception or ends its process; a UserError, OSError, MemoryError or
    Stopped that it raises is raised here too. Before `supervise` ends, it ends every process that
    the call has started.

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
        _trace_file() as trace,
        _adopting_orphans(),
        _Requests(patient) as requests,
    ):
        parent = os.getpid()
        child = os.fork()
        if not child:
            _serve(call, page, trace, parent, requests)
        requests.pass_on_to(child)
        hung = not requests.wait(time.monotonic() + limit)
        if hung and not requests.last:
            _signal(child, signal.SIGUSR2)  # faulthandler says where
            requests.wait(time.monotonic() + EXPLAIN)
        status = _end(child, before)
        requests.pass_on_to(0)
        outcome = page.get()
        if outcome is None or outcome[0] == "failed":
            requests.settle()
        asked = requests.last or page.request
        said, notes = _read(trace), page.notes
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


def how_it_ended(status: int) -> str:
    """A process's end in words, from what `waitpid` says."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended its process with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def where(place: str, notes: dict[str, Any]) -> str:
    """` while training, in forward of cnnlib/stages/mine.py:12`, as far as it is known."""
    phase = notes.get("phase")
    doing = f" while {DOING.get(phase, phase)}" if phase else ""
    return doing + (f"{',' if doing else ''} in {place}" if place else "")


# in the supervised process ----------------------------------------------------------------------


def _serve(
    call: Callable[[], Any], page: Page, trace: IO[bytes], parent: int, requests: "_Requests"
) -> NoReturn:
    """Make the call, leave its outcome in the page and end this process, whatever happens."""
    global _page
    own, code = os.getpid(), 1
    try:
        os.setsid()  # what the call sends to its own process group reaches nobody else
        if LINUX:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(code)
        with contextlib.suppress(OSError):  # where memory runs out, the caller has to survive
            Path("/proc/self/oom_score_adj").write_text("500")
        _page = page
        requests.note_in(page, own)
        faulthandler.enable(file=trace, all_threads=False)
        faulthandler.register(signal.SIGUSR2, file=trace, all_threads=False)
        outcome: tuple[str, Any] | None
        try:
            outcome = "returned", call()
        except BaseException as error:
            outcome = None if page.request else _raised(error)
        # a stage may have forked, and its copy may have come this far
        if outcome is not None and os.getpid() == own:
            page.put(outcome)
            code = 0
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(code)


def _raised(error: BaseException) -> tuple[str, Any]:
    """The exception itself if it can be passed on, or else its text, place and traceback."""
    if isinstance(error, TRAVELLING):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return "raised", error
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    return "failed", (text, place_of(error.__traceback__), trace)


def place_of(trace: TracebackType | None) -> str:
    """`train of cnnlib/stages/mine.py:9`: the innermost line of cnnlib's, or the innermost one."""
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(trace)]
    return _innermost(frames[::-1])


def place_in(text: str) -> str:
    """The same place, found in what faulthandler has written about the current thread."""
    text = text.partition("(most recent call first)")[2].partition("\n\n")[0]
    found = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', text, re.MULTILINE)
    return _innermost([(file, int(line), name) for file, line, name in found])


def _innermost(frames: list[tuple[str, int | None, str]]) -> str:
    frames = [frame for frame in frames if frame[0] != __file__]
    inside = [frame for frame in frames if Path(frame[0]).is_relative_to(ROOT / "cnnlib")]
    for file, line, name in inside or frames:
        path = Path(file)
        shown = path.relative_to(ROOT) if inside else path.name
        return f"{name} of {shown}:{line}"
    return ""


def sends_signals(frame: FrameType | None) -> bool:
    """Whether the code in this frame has probably sent the signal that interrupts it.

    When a process sends itself a signal, Python runs the handler before `os.kill` returns. Who sent
    a signal is not known to a handler in Python, so the names that the code uses have to do.
    """
    names = {"kill", "killpg", "raise_signal", "pthread_kill"}
    return frame is not None and bool(names & set(frame.f_code.co_names))


# in the calling process -------------------------------------------------------------------------


class _Requests:
    """A context in which requests to stop are remembered and passed on to the forked process."""

    def __init__(self, patient: bool) -> None:
        self.last = 0
        self._patient = patient
        self._child = 0
        self._deadline = math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Requests":
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # held back until both processes know what to do about them
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
        """In the forked process: note a request in the page and raise an exception."""

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
        """Pass requests on to this process from now on; 0: to none."""
        self._child = child
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not self._patient or self.last:
            self._deadline = min(self._deadline, time.monotonic() + GRACE)
        self.last = number
        if self._child:
            _signal(self._child, number)
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


def _end(child: int, before: set[int]) -> int:
    """End the process, its group and whatever they have left running; the process's status."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # its number is not free before it has been waited for
    _signal(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    named: dict[int, str] = {}
    ends = time.monotonic() + LEFTOVERS
    while (left := children() - before) and time.monotonic() < ends:
        for process in left:
            name, session = _name_and_session(process)
            if session not in (0, child):  # those of its own session have just been killed
                named[process] = name
            _signal(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        time.sleep(0.002)
    if named:
        listed = ", ".join(f"{name} ({process})" for process, name in list(named.items())[:8])
        print(f"warning: ended what was left running: {listed}", file=sys.stderr, flush=True)
    return status


def children() -> set[int]:
    """Numbers of this process's children; none where the system does not list them."""
    found: set[int] = set()
    with contextlib.suppress(OSError, ValueError):
        for task in Path("/proc/self/task").iterdir():
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def _name_and_session(process: int) -> tuple[str, int]:
    """Name and session of a process; session 0 if it has ended."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        head, _, tail = Path(f"/proc/{process}/stat").read_text().rpartition(")")
        state, _, _, session, *_ = tail.split()
        if state not in "ZX":
            return head.partition("(")[2], int(session)
    return "", 0


def memory_shortages() -> int:
    """How many processes the kernel has killed for lack of memory, in containers as well."""
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """A context in which processes whose parents have ended become children of this one."""
    if not LINUX:
        yield
        return
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(PR_SET_CHILD_SUBREAPER, 0)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


@contextlib.contextmanager
def _trace_file() -> Iterator[IO[bytes]]:
    """An unnamed file into which faulthandler writes."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("trace"), "w+b", buffering=0) as file:
            yield file
        return
    with tempfile.TemporaryFile(buffering=0) as file:
        yield file


def _read(trace: IO[bytes]) -> str:
    """What faulthandler has written, without its list of extension modules."""
    trace.seek(0)
    return trace.read().decode(errors="replace").partition("\nExtension modules:")[0].strip()
