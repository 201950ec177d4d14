"""Whether B is faster or slower than A, from repeats of the same measurement in both.

The effect is the ratio of the medians of all epochs, B over A: above 1, B is slower. Its 95 %
interval is a bootstrap over whole repeats (cnnlib.measuring.intervals). Kalibera and Jones
recommend this: an interval for the size of the effect instead of a test whether there is one, by
repetition at the highest level that varies (Rigorous benchmarking in reasonable time, ISMM 2013).

The interval alone is too narrow where repeats are few: of two and three repeats that differ by
chance alone, one side is completely above the other in 2 of 10 cases. A ratio must therefore also
pass a practical threshold, which is what repeats of one folder differ by: of all pairs of repeats
of one run that A has of this stage and network, at any batch size, and of all that B has, the
medians of 19 in 20 are nearer to each other. It is FLOOR at least. The verdict is

    slower  the interval lies above 1, and the ratio is above 1 + threshold
    faster  the interval lies below 1, and the ratio is below 1 / (1 + threshold)
    same    the whole interval lies within the threshold, or within SAME if that is less
            (a test of equivalence, as of Schuirmann, J. Pharmacokin. Biopharm. 15, 1987)
    unsure  anything else, and whatever was repeated only once in A or in B

A change of a stage's code usually changes all its batch sizes, and each of them alone is noisy. All
together therefore have a verdict of their own: the median over the batch sizes of the logarithms of
their ratios. Its interval is made of the same draws, its threshold of the same pairs of repeats,
each with its median over the batch sizes.

docs/comparing.md says what this finds, and how often it is wrong, on the published repeats.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cnnlib.comparing.results import Key, Measured
from cnnlib.measuring.intervals import SEED, drawn

FLOOR = 0.02
"""The least practical threshold, as a share: smaller differences hardly matter to a user."""
SHARE = 0.95
"""Share of the pairs of repeats that lie within the threshold."""
SAME = 0.1
"""Runs are not called the same if they may differ by more, however noisy they are."""
LEAST_PAIRS = 6
"""Pairs that a threshold is taken from at least, those of three repeats in A and three in B. Where
a stage and network have fewer, all of the same kind of device are taken; for all batch sizes
together it is then the threshold of single runs, which is larger.
"""

Word = Literal["faster", "slower", "same", "unsure"]
Line = tuple[str, str, str, str]
"""Data set, network, stage and kind of device: all its batch sizes have one threshold."""
Pairs = Mapping[Key, tuple[Measured, Measured]]
"""A run -> what A and B have of it."""


@dataclass(frozen=True)
class Effect:
    """How many times as long B takes as A, and what that means."""

    word: Word
    ratio: float
    low: float
    high: float
    """95 % interval of the ratio; nan where there is none."""
    threshold: float
    """Share by which the ratio must differ from 1; nan where too few repeats are known."""


@dataclass(frozen=True)
class RunEffect:
    """One run in both folders."""

    key: Key
    a: Measured
    b: Measured
    effect: Effect


@dataclass(frozen=True)
class LineEffect:
    """A stage on a network, all batch sizes together."""

    line: Line
    batch_sizes: tuple[int, ...]
    effect: Effect


def line_of(key: Key) -> Line:
    """What a key has besides the batch size."""
    return key.dataset, key.network, key.stage, key.device_kind


def effects(pairs: Pairs, floor: float = FLOOR) -> tuple[list[RunEffect], list[LineEffect]]:
    """The effects of runs that have epochs in both folders, and of lines with several of them.

    Both in the order of `pairs`. `floor` is the least threshold.
    """
    lines: dict[Line, list[Key]] = {}
    for key in pairs:
        lines.setdefault(line_of(key), []).append(key)
    limits = thresholds(pairs, lines, floor)
    draws = {
        key: np.log(drawn(a.repeats, b.repeats, SEED + number))
        for number, (key, (a, b)) in enumerate(pairs.items())
        if len(a.repeats) > 1 and len(b.repeats) > 1
    }
    of_runs = [
        RunEffect(key, a, b, run_effect(a, b, draws.get(key), limits[line_of(key)]))
        for key, (a, b) in pairs.items()
    ]
    of_lines = []
    for line, keys in lines.items():
        if len(keys) > 1:
            # those with an interval of their own, or all where none has one
            used = [key for key in keys if key in draws] or keys
            found = together({key: pairs[key] for key in used}, draws, limits[line], floor)
            of_lines.append(LineEffect(line, tuple(key.batch_size for key in used), found))
    return of_runs, of_lines


def run_effect(
    a: Measured, b: Measured, draws: NDArray[np.float64] | None, threshold: float
) -> Effect:
    """The effect of one run; the same rows have the same times, however few they are."""
    if is_copy(a, b):
        return Effect("same", 1.0, 1.0, 1.0, threshold)
    return judged(b.median / a.median, draws, threshold)


def is_copy(a: Measured, b: Measured) -> bool:
    """Whether both have the same times, to the last bit: no measurement comes out so twice."""
    return a.seconds.keys() == b.seconds.keys() and all(
        np.array_equal(times, b.seconds[repeat]) for repeat, times in a.seconds.items()
    )


def together(
    pairs: Pairs, draws: Mapping[Key, NDArray[np.float64]], otherwise: float, floor: float
) -> Effect:
    """The effect of all these batch sizes; `otherwise` is the threshold of single runs."""
    if all(is_copy(a, b) for a, b in pairs.values()):
        return Effect("same", 1.0, 1.0, 1.0, otherwise)
    ratio = math.exp(float(np.median([math.log(b.median / a.median) for a, b in pairs.values()])))
    own = [draws[key] for key in pairs if key in draws]
    between = spread_together(pairs)
    limit = threshold(between, floor) if len(between) >= LEAST_PAIRS else otherwise
    return judged(ratio, np.median(own, axis=0) if own else None, limit)


def judged(ratio: float, draws: NDArray[np.float64] | None, threshold: float) -> Effect:
    """The effect of a ratio, from the draws of its logarithm (None: there are none)."""
    if draws is None:
        return Effect("unsure", ratio, math.nan, math.nan, threshold)
    low, high = (float(each) for each in np.exp(np.quantile(draws, [0.025, 0.975])))
    most, alike = 1 + threshold, 1 + min(threshold, SAME)
    word: Word = "unsure"  # as it stays where the threshold is nan
    if low > 1 and ratio > most:
        word = "slower"
    elif high < 1 and ratio < 1 / most:
        word = "faster"
    elif 1 / alike <= low and high <= alike:
        word = "same"
    return Effect(word, ratio, low, high, threshold)


def thresholds(
    pairs: Pairs, lines: Mapping[Line, Sequence[Key]], floor: float
) -> dict[Line, float]:
    """The threshold of the runs of each line; nan where there are too few repeats for one."""
    own = {line: spread(pairs, keys) for line, keys in lines.items()}
    by_kind: dict[str, list[float]] = {}
    for line, between in own.items():
        by_kind.setdefault(line[3], []).extend(between)
    taken = {
        line: between if len(between) >= LEAST_PAIRS else by_kind[line[3]]
        for line, between in own.items()
    }
    return {
        line: threshold(between, floor) if len(between) >= LEAST_PAIRS else math.nan
        for line, between in taken.items()
    }


def threshold(differences: Sequence[float], floor: float) -> float:
    """The threshold by the differences between the logarithms of pairs of repeats."""
    return max(floor, math.expm1(float(np.quantile(differences, SHARE))))


def spread(pairs: Pairs, keys: Iterable[Key]) -> list[float]:
    """By how much the logarithms of the medians of two repeats of one run and folder differ."""
    return [
        abs(first - second)
        for key in keys
        for side in pairs[key]
        for first, second in itertools.combinations(logarithms(side).values(), 2)
    ]


def spread_together(pairs: Pairs) -> list[float]:
    """The same of two repeats of one folder: the median over the batch sizes that both have."""
    found = []
    for runs in zip(*pairs.values(), strict=True):
        times = [logarithms(run) for run in runs]
        repeats = sorted(set(itertools.chain(*times)))
        for first, second in itertools.combinations(repeats, 2):
            both = [
                each[first] - each[second] for each in times if first in each and second in each
            ]
            if both:
                found.append(abs(float(np.median(both))))
    return found


def logarithms(run: Measured) -> dict[int, float]:
    """Repeat -> logarithm of the median of its epochs."""
    return {repeat: math.log(np.median(times)) for repeat, times in run.seconds.items()}
