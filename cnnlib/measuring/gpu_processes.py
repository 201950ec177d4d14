"""Which other processes use the GPU on which a run is timed.

A run is disturbed when NVML's list of compute processes contains one that is neither the run nor
its child, in a look within a timed phase, in the last look before it or in the first one after it:
nothing is known of the time between two looks. Presence counts: any process with a CUDA context may
launch at any time, and NVML's figure for a process's share of the GPU is a mean over longer than
many a run takes.

In a container NVML may know the run by another number than the system does. Where the run's own
number is never listed, one of the processes listed is taken for it, and only a second one counts as
another.

Other runs of a sweep that prepares several side by side do not count: they wait while the run is
timed (cnnlib.system.turns), and only keep their memory.

What NVML does not list goes unnoticed: processes that only draw, and those of other containers
where the driver hides them.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Span = tuple[float, float]
"""Beginning and end, by time.perf_counter."""


class ListedProcess(Protocol):
    """An entry of NVML's list of compute processes."""

    @property
    def pid(self) -> int: ...

    @property
    def usedGpuMemory(self) -> int | None: ...


@dataclass
class Presence:
    """A process on the GPU, from the look before it was first seen to the one after it was last.

    It has no end where there was no such look.
    """

    process: int
    own: bool
    name: str
    memory_mib: float
    began: float
    ended: float = math.inf
    waits: bool = False
    """Whether it is one of the same sweep, which waits while the run is timed."""

    def overlaps(self, spans: Iterable[Span]) -> bool:
        """Whether the process may have been there at some moment of `spans`."""
        return any(self.began <= ended and began <= self.ended for began, ended in spans)


class ProcessTracker:
    """Keeps the presences of all processes that are listed, look by look."""

    def __init__(self, process: int, sweep: int | None = None) -> None:
        self.presences: list[Presence] = []
        self._process, self._sweep = process, sweep
        self._there: dict[int, Presence] = {}
        self._last = -math.inf

    def look(
        self, at: float, listed: Sequence[ListedProcess] | None, name: Callable[[int], str] = str
    ) -> None:
        """Take in what NVML lists at a moment (None: it does not answer).

        `name` is called only for a process that was not there at the last look.
        """
        if listed is None:
            return
        found = {entry.pid: (entry.usedGpuMemory or 0) / 2**20 for entry in listed}
        for process, memory_mib in found.items():
            if process not in self._there:
                own = is_or_descends_from(process, self._process)
                waits = self._sweep is not None and is_or_descends_from(process, self._sweep)
                presence = Presence(
                    process, own, name(process), memory_mib, self._last, waits=waits and not own
                )
                self._there[process] = presence
                self.presences.append(presence)
            elif memory_mib > self._there[process].memory_mib:
                self._there[process].memory_mib = memory_mib
        for process in self._there.keys() - found.keys():
            self._there.pop(process).ended = at
        self._last = at


def others(presences: Sequence[Presence], spans: Sequence[Span]) -> list[Presence]:
    """The presences that disturb a run which is timed in `spans`.

    Where NVML knows the run itself by another number, the run is among them.
    """
    there = [presence for presence in presences if presence.overlaps(spans)]
    if any(presence.own for presence in presences):
        return [presence for presence in there if not presence.own and not presence.waits]
    return there if len({presence.process for presence in there}) > 1 else []


def is_or_descends_from(process: int, ancestor: int) -> bool:
    """Whether a process is `ancestor` or was begun by it; False where /proc does not show it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        while process > 1:
            if process == ancestor:
                return True
            # The name, in brackets before the parent's number, may contain anything.
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False
