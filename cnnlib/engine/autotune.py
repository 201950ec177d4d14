"""Which of several ways to do the same work is the fastest: measured once, kept with compiled code.

Choices are kept by the content that they depend on, as compiled code is (cnnlib/device/cache.py):
another device, another version of a kernel or another batch size is measured anew.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from cnnlib.device.cache import cached, content_of

WORTH = 0.97
"""A candidate replaces the first one only if its time is below this share of the first one's.

What is not clearly quicker is not chosen, so that two measurements of the same thing come to the
same choice, and a training to the same last bits.
"""

STEADY = 1.2
"""Largest ratio of the longest to the shortest time of the same work, if it is undisturbed."""


class Unsteady(Exception):
    """Times do not repeat: something else computes on the device too."""


def steady(times: list[float]) -> float:
    """The shortest of several times in seconds of the same thing; Unsteady if they differ."""
    if max(times) > STEADY * min(times):
        raise Unsteady
    return min(times)


def measured_once(key: str, count: int, measure: Callable[[], list[float]]) -> list[float]:
    """The `count` times in seconds kept under `key`, or else those of `measure`.

    nan means that something cannot be done. A damaged entry, or one of another kind, is replaced;
    nothing is kept when `measure` raises.
    """

    def write(file: Path) -> None:
        file.write_text(json.dumps(measure()))

    for _ in range(2):
        path = cached(key, ".times", write)
        try:
            times = [float(time) for time in json.loads(content_of(path))]
            if len(times) == count:
                return times
        except (ValueError, TypeError):
            pass
        path.unlink(missing_ok=True)
    raise ValueError(f"{count} times were to be measured")


def fastest(times: list[float]) -> int:
    """Index of the least time, or 0 where that is hardly less than the first."""
    best = min(range(len(times)), key=lambda i: math.inf if math.isnan(times[i]) else times[i])
    return best if math.isnan(times[0]) or times[best] < WORTH * times[0] else 0
