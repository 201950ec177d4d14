"""The log in which probes write what they measured: rows of the table `probes`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cnnlib.errors import UserError
from cnnlib.measuring.schema import Row

Step = tuple[tuple[str, ...], Callable[[], None]]
"""The names of probes that are measured together, and the call that measures them."""

REPEATS = 5
"""Measurements of each probe, as long as there is time."""


@dataclass
class ProbeLog:
    """Rows of the table `probes`, and the time that is left for more of them."""

    deadline: float = math.inf
    """Value of time.perf_counter after which nothing is measured more than once."""
    rows: list[Row] = field(default_factory=list)
    device: str = ""
    device_kind: str = ""

    def begin(self, device: str, device_kind: str, seconds: float) -> None:
        """Begin the rows of a device, which may take about so many seconds."""
        self.device, self.device_kind = device, device_kind
        self.deadline = time.perf_counter() + seconds

    def repeat(
        self,
        probe: str,
        measure: Callable[[], float],
        unit: str = "s",
        work: float = 0.0,
        size: int = 0,
    ) -> None:
        """Add rows of up to REPEATS calls of `measure`, which returns seconds.

        The rate is `work` per second, in `unit`; with the unit "s" it is the seconds themselves.
        """
        for repeat in range(1, REPEATS + 1):
            seconds = measure()
            rate = seconds if unit == "s" else work / seconds
            self.add(probe, size, repeat, seconds, rate, unit)
            if time.perf_counter() > self.deadline:
                return

    def add(
        self,
        probe: str,
        size: int,
        repeat: int,
        seconds: float,
        rate: float,
        unit: str,
        status: str = "ok",
    ) -> None:
        self.rows.append(
            {
                "device": self.device,
                "device_kind": self.device_kind,
                "probe": probe,
                "size_bytes": size,
                "repeat": repeat,
                "seconds": seconds,
                "rate": rate,
                "unit": unit,
                "status": status,
            }
        )

    @contextmanager
    def probing(self, *probes: str) -> Iterator[None]:
        """If the block fails, add a row `unavailable` for each of `probes` and go on."""
        try:
            yield
        except (UserError, MemoryError):
            for probe in probes:
                self.add(probe, 0, 1, math.nan, math.nan, "", "unavailable")
