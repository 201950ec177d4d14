"""Two folders of results, compared."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cnnlib.comparing.differences import Difference, differences
from cnnlib.comparing.results import Key, Measured, Results, read
from cnnlib.comparing.verdicts import FLOOR, LineEffect, RunEffect, effects, line_of
from cnnlib.errors import DataError
from cnnlib.stages import ALL

BROKEN = ("failed", "diverged")
"""Statuses of a run that has stopped working, where it worked before."""
TRUSTED = 3
"""Repeats in A and in B from which on a single run that is slower is a regression. Of two repeats
it happens too often by chance that one side is above the other.
"""
WORDS = ("slower", "faster", "same", "unsure")


class LeftOut(NamedTuple):
    """A run that has no verdict, and why."""

    key: Key
    why: str
    broken: bool = False
    """Whether it worked in A and ended with one of BROKEN in B."""


@dataclass(frozen=True)
class Comparison:
    """What differs between the folders, the verdicts, and the runs without one."""

    a: Path
    b: Path
    differences: list[Difference]
    runs: list[RunEffect]
    lines: list[LineEffect]
    left_out: list[LeftOut]
    undescribed: list[str]
    """A or B or both, where the folder has no run.json."""

    @property
    def regressions(self) -> list[str]:
        """What is slower in B beyond its threshold, or works no longer, in words.

        Single runs count where both folders have TRUSTED repeats.
        """
        slow = [each for each in self.runs if each.effect.word == "slower"]
        runs = [f"{name_of_run(each.key)}: slower" for each in slow if is_trusted(each)]
        lines = [
            f"{name_of_line(each)}: slower" for each in self.lines if each.effect.word == "slower"
        ]
        broken = [f"{name_of_run(each.key)}: {each.why}" for each in self.left_out if each.broken]
        return [*lines, *runs, *broken]

    def counts(self) -> dict[str, int]:
        """Verdict -> how many runs have it."""
        return {word: sum(run.effect.word == word for run in self.runs) for word in WORDS}


def is_trusted(run: RunEffect) -> bool:
    """Whether the run was repeated often enough to be a regression by itself."""
    return min(len(run.a.seconds), len(run.b.seconds)) >= TRUSTED


def compare(a: Path, b: Path, floor: float = FLOOR) -> Comparison:
    """Compare two folders; `floor` is the least threshold, as a share.

    Raises DataError naming what is no folder of results, what is damaged, or that the folders have
    no run in common.
    """
    return compare_results(read(a), read(b), floor)


def compare_results(a: Results, b: Results, floor: float = FLOOR) -> Comparison:
    """The same for results that have been read."""
    common = in_order(a.runs.keys() & b.runs.keys())
    if not common:
        raise DataError(
            f"{a.folder} and {b.folder} have no run in common: {contents(a)} in the first, "
            f"{contents(b)} in the second"
        )
    pairs: dict[Key, tuple[Measured, Measured]] = {}
    left_out = []
    for key in common:
        first, second = a.runs[key], b.runs[key]
        if why := incomparable(first, second):
            broken = first.status == "ok" and second.status in BROKEN
            left_out.append(LeftOut(key, why, broken))
        else:
            pairs[key] = first, second
    for key in in_order(a.runs.keys() ^ b.runs.keys()):
        left_out.append(LeftOut(key, f"only in {'A' if key in a.runs else 'B'}"))
    runs, lines = effects(pairs, floor)
    undescribed = [side for side, each in (("A", a), ("B", b)) if not each.facts]
    return Comparison(a.folder, b.folder, differences(a, b), runs, lines, left_out, undescribed)


def incomparable(a: Measured, b: Measured) -> str:
    """Why two measurements of a run cannot be compared; "" if they can."""
    lacking = [
        f"{run.status} in {side}" + (f" ({run.reason})" if run.reason else "")
        for side, run in (("A", a), ("B", b))
        if not run.seconds
    ]
    if lacking:
        return "; ".join(lacking)
    if a.images and b.images and a.images != b.images:
        sizes = " and ".join(str(max(run.images)) for run in (a, b))
        return f"their epochs have {sizes} images"
    return ""


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Keys by data set and network, stages as on the ladder and peers after them."""
    known = {stage.name: place for place, stage in enumerate(ALL)}
    return sorted(
        keys,
        key=lambda key: (
            key.dataset,
            key.network,
            known.get(key.stage, math.inf),
            key.stage,
            key.device_kind,
            key.batch_size,
        ),
    )


def contents(results: Results) -> str:
    """The data sets, networks, stages and batch sizes of a folder, for a message."""
    keys = list(results.runs)
    if not keys:
        return "no run"
    columns = zip(*keys, strict=True)
    names = ("data set", "network", "stage", "on", "batch")
    return "; ".join(
        f"{name} {', '.join(map(str, sorted(set(values))))}"
        for name, values in zip(names, columns, strict=True)
    )


def name_of_run(key: Key) -> str:
    """`tuned, batch 64`, with data set, network and kind where they are not the usual ones."""
    return f"{name_of_stage(line_of(key))}, batch {key.batch_size}"


def name_of_line(line: LineEffect) -> str:
    """`tuned on lenet5 (mnist), all 9 batch sizes`."""
    return f"{name_of_stage(line.line)}, {len(line.batch_sizes)} batch sizes together"


def name_of_stage(line: tuple[str, str, str, str]) -> str:
    """`tuned (lenet5 on mnist)`, and that its kernels were emulated."""
    dataset, network, stage, kind = line
    return f"{stage} ({network} on {dataset}{', emulated' if kind == 'emulated' else ''})"
