"""Processes that a supervised call leaves behind: they are found, adopted and ended."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LEFTOVERS = 5.0
"""Seconds after which killing the processes that a call has left behind is given up."""

LINUX = sys.platform.startswith("linux")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    if LINUX:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
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


def end_with_leftovers(child: int, before: set[int]) -> int:
    """End the process `child`, its group and the children that were not there `before`.

    Returns the status that `waitpid` reports of the process.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # its number is not free before it has been waited for
    send(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    named: dict[int, str] = {}
    ends = time.monotonic() + LEFTOVERS
    while (left := children() - before) and time.monotonic() < ends:
        for process in left:
            name, session = _name_and_session(process)
            if session not in (0, child):  # the others have just been killed with their group
                named[process] = name
            send(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        time.sleep(0.002)
    if named:
        listed = ", ".join(f"{name} ({process})" for process, name in list(named.items())[:8])
        print(f"warning: ended what was left running: {listed}", file=sys.stderr, flush=True)
    return status


def children() -> set[int]:
    """Process ids of this process's children; none where the system does not list them."""
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


def how_it_ended(status: int) -> str:
    """A process's end in words, from what `waitpid` says."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended its process with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def send(process: int, number: int) -> None:
    """Send a signal to a process, if it is still there and may be signalled."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)
