"""Where probes write what they measured: rows of the table `probes`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cnnlib.errors import UserError

Row = dict[str, Any]
Step = tuple[tuple[str, ...], Callable[[], None]]
"""The probes that are measured together, and how."""

REPEATS = 5


@dataclass
class Book:
    """Rows of the table `probes`, and the time there is for them."""

    deadline: float = math.inf
    """perf_counter after which nothing is measured more than once."""
    rows: list[Row] = field(default_factory=list)
    device: str = ""
    device_kind: str = ""

    def begin(self, device: str, device_kind: str, seconds: float) -> None:
        """What follows is about this device, and there are so many seconds for it."""
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
        """Rows of up to REPEATS calls of `measure`, which returns seconds.

        The rate is work / seconds, in a unit that `work` is given in; in "s" it is the seconds.
        """
        for repeat in range(1, REPEATS + 1):
            seconds = measure()
            rate = seconds if unit == "s" else work / seconds
            self.add(probe, size, repeat, seconds, rate, unit, "ok")
            if time.perf_counter() > self.deadline:
                return

    def add(
        self, probe: str, size: int, repeat: int, seconds: float, rate: float, unit: str,
        status: str,
    ) -> None:  # fmt: skip
        self.rows.append(
            {
                "device": self.device, "device_kind": self.device_kind, "probe": probe,
                "size_bytes": size, "repeat": repeat, "seconds": seconds, "rate": rate,
                "unit": unit, "status": status,
            }
        )  # fmt: skip

    @contextmanager
    def probing(self, *probes: str) -> Iterator[None]:
        """What fails inside leaves a row `unavailable` for each of `probes`; the others go on."""
        try:
            yield
        except (UserError, MemoryError):
            for probe in probes:
                self.add(probe, 0, 1, math.nan, math.nan, "", "unavailable")
