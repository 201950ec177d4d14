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
    the other long ones. Long tests with a fixture of their module stay together. The order is the
    same in every process of the tests.
    """
    slow = _together([item for item in items if seconds(item)])
    slow.sort(key=lambda group: (any(_waits(item, later) for item in group), -_longest(group)))
    rest = iter([item for item in items if not seconds(item)])
    sizes = _sizes(len(items), processes)
    parts: list[list[pytest.Item]] = [[] for _ in sizes]
    filled = [0.0] * processes
    for group in slow:
        # To the process that has the least to do so far, of those with room for it.
        room = [n for n, size in enumerate(sizes) if len(parts[n]) + len(group) <= size]
        if room:
            n = min(room, key=lambda n: filled[n])
            parts[n] += group
            filled[n] += _longest(group)
    for part, size in zip(parts, sizes, strict=True):
        part += islice(rest, size - len(part))
    dealt = set(chain.from_iterable(parts))
    return [*chain.from_iterable(parts), *(item for item in items if item not in dealt)]


def _together(items: Collection[pytest.Item]) -> list[list[pytest.Item]]:
    """The tests, those in one group that wait for a fixture of their module.

    Several processes would each make it, and that is what takes long, and not the single tests.
    """
    groups: dict[object, list[pytest.Item]] = {}
    for item in items:
        shared = frozenset(_of_its_module(item))
        groups.setdefault((item.path, shared) if shared else item, []).append(item)
    return list(groups.values())


def _longest(group: Collection[pytest.Item]) -> float:
    return max(map(seconds, group))


def _waits(item: pytest.Item, later: Collection[str]) -> bool:
    return not set(later).isdisjoint(_fixtures(item))


def _of_its_module(item: pytest.Item) -> list[str]:
    """The fixtures of the test that are made once for its module."""
    known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    return [name for name, made in known.items() if made[-1].scope == "module"]


def _fixtures(item: pytest.Item) -> list[str]:
    return list(getattr(item, "fixturenames", ()))


def _sizes(tests: int, processes: int) -> list[int]:
    """The sizes of the parts that `--dist worksteal` begins with."""
    sizes = []
    for left in range(processes, 0, -1):
        sizes.append(tests // left)
        tests -= sizes[-1]
    return sizes
