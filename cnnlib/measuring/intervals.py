"""Bootstrap intervals of medians and of ratios of medians, over the repeats of a measurement.

Repeats are the independent observations: whole repeats are drawn with replacement, since epochs
within a repeat are not independent. The percentile method (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13), with a fixed seed, so that the same rows give the same table.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 20171

Repeats = Sequence[NDArray[np.float64]]
"""The epoch times of each repeat, in seconds."""


def interval(repeats: Repeats, base: Repeats | None) -> tuple[float, float]:
    """95 % interval of the median of `repeats`, or of the median of `base` over it.

    (nan, nan) where one of them has fewer than two repeats.
    """
    if len(repeats) < 2 or (base is not None and len(base) < 2):
        return np.nan, np.nan
    found = _bootstrap(repeats, base).confidence_interval
    return found.low, found.high


def drawn(repeats: Repeats, base: Repeats, seed: int) -> NDArray[np.float64]:
    """RESAMPLES values of the median of `base` over that of `repeats`, in the order of drawing.

    Both have two repeats or more. Draws by different seeds are independent of each other.
    """
    draws: NDArray[np.float64] = _bootstrap(repeats, base, seed).bootstrap_distribution
    return draws


def _bootstrap(repeats: Repeats, base: Repeats | None, seed: int = SEED) -> Any:
    """The BootstrapResult of scipy, which has no types."""
    from scipy.stats import bootstrap  # it takes a second to import, and single repeats need none

    samples = [repeats] if base is None else [base, repeats]
    padded = [pad(sample) for sample in samples]
    # np.median gives the same where nothing is missing, and is several times faster
    median: Callable[..., NDArray[np.float64]]
    median = np.nanmedian if any(np.isnan(rows).any() for rows in padded) else np.median

    def statistic(*drawn: NDArray[np.intp], axis: int = -1) -> NDArray[np.float64]:
        medians = [
            median(rows[which].reshape(*which.shape[:-1], -1), axis=-1)
            for rows, which in zip(padded, drawn, strict=True)
        ]
        found: NDArray[np.float64] = medians[0] if base is None else medians[0] / medians[1]
        return found

    return bootstrap(
        [np.arange(len(sample)) for sample in samples],
        statistic,
        vectorized=True,
        axis=-1,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def pad(sample: Repeats) -> NDArray[np.float64]:
    """Rows of unequal length as one array, filled up with nan."""
    width = max(len(row) for row in sample)
    return np.array([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in sample])
