"""Who else computes on the GPU on which a run is timed.

A run is disturbed when NVML's list of compute processes holds one that is neither the run nor its
child, at a look within a timed phase or at the last look before it or the first one after: between
two looks nobody knows. To be there is enough. Who has a context can launch at any moment, and what
NVML says of a process's share of the GPU is a mean over as long a time as many a run takes.

In a container NVML may know the run by another number than the system does. Where the run's own
number is never listed, one of the processes listed is taken for it, and a second one is another's.

What NVML does not list is not noticed: processes that only draw, and those of other containers
where the driver hides them.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Span = tuple[float, float]


@dataclass
class Presence:
    """A process seen on the GPU, from the look before it was first seen to the one after the last;
    without end where there was no such look.
    """

    process: int
    own: bool
    name: str
    memory_mib: float
    began: float
    ended: float = math.inf

    def within(self, spans: Iterable[Span]) -> bool:
        """Whether it may have been there at some moment of them."""
        return any(self.began <= ended and began <= self.ended for began, ended in spans)


class Watch:
    """Keeps the presences of all processes that are listed, look by look."""

    def __init__(self, process: int) -> None:
        self.presences: list[Presence] = []
        self._process = process
        self._there: dict[int, Presence] = {}
        self._last = -math.inf

    def look(
        self, at: float, listed: Sequence[Any] | None, name: Callable[[int], str] = str
    ) -> None:
        """Take in what NVML lists at a moment (None: it does not answer).

        `name` is asked only for a process that was not there at the last look.
        """
        if listed is None:
            return
        found = {entry.pid: (entry.usedGpuMemory or 0) / 2**20 for entry in listed}
        for process, memory_mib in found.items():
            if process not in self._there:
                own = is_or_descends_from(process, self._process)
                presence = Presence(process, own, name(process), memory_mib, self._last)
                self._there[process] = presence
                self.presences.append(presence)
            elif memory_mib > self._there[process].memory_mib:
                self._there[process].memory_mib = memory_mib
        for process in self._there.keys() - found.keys():
            self._there.pop(process).ended = at
        self._last = at


def others(presences: Sequence[Presence], spans: Sequence[Span]) -> list[Presence]:
    """Those by which a run is disturbed that is timed in `spans`.

    Where NVML has another number for the run itself, that stands among them.
    """
    there = [presence for presence in presences if presence.within(spans)]
    if any(presence.own for presence in presences):
        return [presence for presence in there if not presence.own]
    return there if len({presence.process for presence in there}) > 1 else []


def is_or_descends_from(process: int, ancestor: int) -> bool:
    """Whether a process is `ancestor` or was begun by it; False where /proc does not show it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        while process > 1:
            if process == ancestor:
                return True
            # the name before it, in brackets, may hold anything
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False
