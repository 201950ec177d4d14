"""The same measurement compared with itself: how often verdicts are wrong, and what they find.

The repeats of one folder are divided into two halves, which differ by chance alone. Whatever is
called faster or slower then is a false alarm. If the second half were slower by a factor, its ratio
and interval would be as many times as large, which says what slowdown would be found. Halves have
few repeats; how more of them do is estimated by dealing out the deviations that were measured.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cnnlib.comparing.comparison import Comparison, compare_results, name_of_stage
from cnnlib.comparing.results import Key, Measured, Results
from cnnlib.comparing.verdicts import Effect, Line, line_of

LEAST_REPEATS = 4
"""A run with fewer has a half with only one repeat, which has no interval."""
FOUND = 0.95
"""Share of the comparisons in which a slowdown has to be found."""

Pair = tuple[Results, Results]


@dataclass(frozen=True)
class Rates:
    """Counts over comparisons of what differs by chance alone."""

    comparisons: int
    runs: int
    """Verdicts on single runs."""
    runs_wrong: int
    """Those that are `faster` or `slower`."""
    lines: int
    """Verdicts on all batch sizes of a stage together."""
    lines_wrong: int
    regressions: int
    """Comparisons with at least one `slower`, which end with exit code 1."""


def halves(results: Results) -> Iterator[Pair]:
    """All ways to divide the repeats of these results into two halves, the smaller one first.

    Each is one set of repeats for all runs, as repeats go through the whole sweep. Runs with fewer
    than LEAST_REPEATS are left out.
    """
    runs = long_enough(results)
    repeats = sorted(set().union(*(run.seconds for run in runs.values())))
    for chosen in itertools.combinations(repeats, len(repeats) // 2):
        rest = set(repeats) - set(chosen)
        first, second = (
            replace(results, runs={key: part(run, set(side)) for key, run in runs.items()})
            for side in (chosen, rest)
        )
        yield first, second


def dealt(results: Results, repeats: int, seed: int) -> Pair:
    """Two folders in which every run has so many repeats, as if there were so many measured.

    A run's repeat deviates from the run by a factor. These factors, of all batch sizes of a stage
    on a network, are shuffled, and each run gets others of them, none twice. What a whole pass
    through the sweep has in common, as when a machine is slow for an hour, is lost by that.
    """
    rng = np.random.default_rng(seed)
    factors: dict[Line, list[float]] = {}
    for key, run in long_enough(results).items():
        middles = np.array([np.median(times) for times in run.repeats])
        factors.setdefault(line_of(key), []).extend(middles / np.median(middles))
    sides: tuple[dict[Key, Measured], dict[Key, Measured]] = ({}, {})
    for key, run in long_enough(results).items():
        chosen = rng.permutation(factors[line_of(key)])[: 2 * repeats].reshape(2, repeats)
        for side, own in zip(sides, chosen, strict=True):
            seconds = {i: np.array([run.median * factor]) for i, factor in enumerate(own, 1)}
            side[key] = replace(run, seconds=seconds)
    return replace(results, runs=sides[0]), replace(results, runs=sides[1])


def long_enough(results: Results) -> dict[Key, Measured]:
    """The runs with LEAST_REPEATS or more."""
    return {key: run for key, run in results.runs.items() if len(run.seconds) >= LEAST_REPEATS}


def part(run: Measured, repeats: set[int]) -> Measured:
    """The run with these of its repeats alone."""
    return replace(run, seconds={i: times for i, times in run.seconds.items() if i in repeats})


def compared(pairs: Iterable[Pair]) -> list[Comparison]:
    """Every pair of folders, compared in both orders."""
    return [compare_results(*each) for a, b in pairs for each in ((a, b), (b, a))]


def rates(comparisons: Sequence[Comparison]) -> Rates:
    """How often runs and lines were called faster or slower."""
    runs = [run.effect.word for each in comparisons for run in each.runs]
    lines = [line.effect.word for each in comparisons for line in each.lines]
    return Rates(
        len(comparisons),
        *(len(runs), runs.count("faster") + runs.count("slower")),
        *(len(lines), lines.count("faster") + lines.count("slower")),
        sum(bool(each.regressions) for each in comparisons),
    )


def least_found(effect: Effect) -> float:
    """The factor by which B would have to be slower to be called slower; inf: it never would."""
    if math.isnan(effect.low) or math.isnan(effect.threshold):
        return math.inf
    return max(1 / effect.low, (1 + effect.threshold) / effect.ratio)


def found_from(comparisons: Sequence[Comparison]) -> dict[Line, tuple[float, float]]:
    """Line -> the slowdown that FOUND of the comparisons find: of all batch sizes, and of one."""
    together: dict[Line, list[float]] = {}
    alone: dict[Line, list[float]] = {}
    for each in comparisons:
        for line in each.lines:
            together.setdefault(line.line, []).append(least_found(line.effect))
        for run in each.runs:
            alone.setdefault(line_of(run.key), []).append(least_found(run.effect))
    return {
        line: (at_share(together.get(line, [math.inf])), at_share(factors))
        for line, factors in alone.items()
    }


def at_share(factors: Sequence[float]) -> float:
    """The factor that FOUND of these do not exceed."""
    return float(np.quantile(factors, FOUND, method="higher"))


def in_words(comparisons: Sequence[Comparison]) -> list[str]:
    """What is wrong, and what is found, in lines for the terminal."""
    found = rates(comparisons)
    said = [
        f"{found.comparisons} comparisons of halves of the repeats, which differ by chance alone",
        f"called faster or slower: {share(found.runs_wrong, found.runs)} runs, "
        f"{share(found.lines_wrong, found.lines)} stages with all batch sizes together",
        f"with a regression: {share(found.regressions, found.comparisons)} comparisons",
        f"a slowdown is found in {100 * FOUND:.0f} % of the comparisons from",
    ]
    for line, (together, alone) in found_from(comparisons).items():
        said.append(
            f"  {name_of_stage(line)}: {slowdown(together)} of all batch sizes, "
            f"{slowdown(alone)} of one"
        )
    return said


def share(count: int, whole: int) -> str:
    """`16 of 1080 (1.5 %)`."""
    return f"{count} of {whole} ({100 * count / whole:.1f} %)" if whole else "0 of 0"


def slowdown(factor: float) -> str:
    """`12 %`, or that no slowdown is found."""
    return "none" if math.isinf(factor) else f"{100 * (factor - 1):.0f} %"
