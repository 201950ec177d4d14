"""Which of several ways to do the same work is the fastest: measured once, kept with compiled code.

Choices are kept by the content that they depend on, as compiled code is (cnnlib/device/cache.py):
another device, another version of a kernel or another batch size is measured anew.
"""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from cnnlib.device.cache import cached, whole_content
from cnnlib.system.turns import alone

WORTH = 0.97
"""A candidate replaces the first one only if its time is below this share of the first one's.

What is not clearly quicker is not chosen, so that two measurements of the same thing come to the
same choice, and a training to the same last bits.
"""

SUFFIX = ".times"

TRIALS = 3
"""Timed trainings of a candidate, after one warm-up; the minimum counts, unless they disagree."""
ATTEMPTS = 3
"""Rounds of timing before the first candidate is taken: all times of a round must repeat."""
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
    nothing is kept when `measure` raises. While it measures, no other run of a sweep is active.
    """
    if (kept := kept_times(key, count)) is not None:
        return kept

    def write(file: Path) -> None:
        file.write_text(json.dumps(measure()))

    with alone():
        for _ in range(2):
            path = cached(key, SUFFIX, write)
            if (times := kept_times(key, count)) is not None:
                return times
            path.unlink(missing_ok=True)
    raise ValueError(f"{count} times were to be measured")


def measured_steadily(key: str, count: int, measure: Callable[[], list[float]]) -> list[float]:
    """measured_once, tried ATTEMPTS times where `measure` raises Unsteady, and then Unsteady."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(Unsteady):
            return measured_once(key, count, measure)
    return measured_once(key, count, measure)


def not_repeated(count: int) -> str:
    """What is recorded where the times of `count` plans did not repeat."""
    return (
        f"times of {count} plans did not repeat in {ATTEMPTS} attempts: something else computes on "
        "the device"
    )


def steps_within(batch_size: int, images: int, least: int, most: int) -> int:
    """Steps of a timed training of about so many images, within limits that keep it short and
    worth something.
    """
    return max(least, min(most, images // batch_size))


def kept_times(key: str, count: int) -> list[float] | None:
    """The times kept under `key`; None where there are none, or others."""
    try:
        data = whole_content(key, SUFFIX)
        times = [float(time) for time in json.loads(data)] if data is not None else []
    except (ValueError, TypeError):
        return None
    return times if len(times) == count else None


def fastest(times: list[float]) -> int:
    """Index of the least time, or 0 where that is hardly less than the first."""
    best = min(range(len(times)), key=lambda i: math.inf if math.isnan(times[i]) else times[i])
    return best if math.isnan(times[0]) or times[best] < WORTH * times[0] else 0
