"""The order of the tests where pytest-xdist shares them out: what takes long begins first.

Each process gets a part of the list, in order, and one that has run its part takes over tests from
the end of another's. So the long tests are dealt out to the beginnings of the parts: none of them
begins when the others have nothing left to do.
"""

from collections.abc import Collection
from itertools import chain, islice

import pytest

USUAL = 5.0
"""Seconds of a test that is marked `slow` without a number."""


def seconds(item: pytest.Item) -> float:
    """How long a test takes, as its mark `slow` says; 0 without such a mark."""
    marks = [mark.args[0] if mark.args else USUAL for mark in item.iter_markers("slow")]
    return float(max(marks, default=0.0))


def longest_first(
    items: list[pytest.Item], processes: int, later: Collection[str]
) -> list[pytest.Item]:
    """The tests in the order in which to share them out among so many processes.

    A test that waits for what is being made ahead, by a fixture of a name in `later`, comes behind
    the other long ones. The order is the same in every process of the tests.
    """
    slow = [item for item in items if seconds(item)]
    slow.sort(key=lambda item: (not set(later).isdisjoint(_fixtures(item)), -seconds(item)))
    rest = iter([item for item in items if not seconds(item)])
    parts: list[list[pytest.Item]] = []
    for number, size in enumerate(_sizes(len(items), processes)):
        long = slow[number::processes][:size]
        parts.append([*long, *islice(rest, size - len(long))])
    dealt = set(chain.from_iterable(parts))
    return [*chain.from_iterable(parts), *(item for item in items if item not in dealt)]


def _fixtures(item: pytest.Item) -> list[str]:
    return list(getattr(item, "fixturenames", ()))


def _sizes(tests: int, processes: int) -> list[int]:
    """The sizes of the parts that `--dist worksteal` begins with."""
    sizes = []
    for left in range(processes, 0, -1):
        sizes.append(tests // left)
        tests -= sizes[-1]
    return sizes
