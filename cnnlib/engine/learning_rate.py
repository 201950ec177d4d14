"""The learning rate over the course of a training: constant, or one cycle."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cnnlib.layers import Array

KEPT_STEPS = 1 << 16
"""Steps of a cycle whose rates are all computed in its first epoch, and kept: half a megabyte. In a
longer cycle each epoch computes its own, which takes little beside its steps.
"""


@dataclass(frozen=True)
class Schedule:
    """`peak` in every step or, with `warmup`, one cycle: up from 0 to it and down to 0 again.

    `warmup` is the share of all steps in which the rate rises; both flanks are straight, as in
    Smith's superconvergence (2018) without its last, lower phase.
    """

    peak: float
    warmup: float | None = None

    def rates(self, epoch: int, epochs: int, steps: int) -> Array:
        """Learning rates (steps,) of epoch `epoch`, counted from 1, of `epochs`.

        Epochs beyond the last one of a cycle have the rates of the last. Constant rates are always
        the same array. What is kept cannot be written to.
        """
        if self.warmup is None:
            return constant(self.peak, steps)
        first, total = (min(epoch, epochs) - 1) * steps, steps * epochs
        if total > KEPT_STEPS:
            return one_cycle(self.peak, self.warmup, total, first, steps)
        return whole_cycle(self.peak, self.warmup, total)[first : first + steps]


def one_cycle(peak: float, warmup: float, total: int, first: int, steps: int) -> Array:
    """The rates (steps,) of a cycle of `total` steps, from step `first` on, counted from 0."""
    done = first + np.arange(steps)
    rising = (done + 1) / max(1.0, warmup * total)
    falling = (total - done) / max(1.0, (1 - warmup) * total)
    rates: Array = peak * np.minimum(1, np.minimum(rising, falling))
    return rates


@lru_cache
def whole_cycle(peak: float, warmup: float, total: int) -> Array:
    """The rates (total,) of a whole cycle, computed once; they cannot be written to."""
    rates = one_cycle(peak, warmup, total, 0, total)
    rates.flags.writeable = False
    return rates


@lru_cache
def constant(rate: float, steps: int) -> Array:
    """The same rate in every step: (steps,), always the same array, which cannot be written to."""
    rates = np.full(steps, rate)
    rates.flags.writeable = False
    return rates
