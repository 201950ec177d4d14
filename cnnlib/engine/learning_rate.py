"""The learning rate over the course of a training: constant, or one cycle."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cnnlib.layers import Array


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
        the same array, which cannot be written to.
        """
        if self.warmup is None:
            return constant(self.peak, steps)
        total = steps * epochs
        done = (min(epoch, epochs) - 1) * steps + np.arange(steps)
        rising = (done + 1) / max(1.0, self.warmup * total)
        falling = (total - done) / max(1.0, (1 - self.warmup) * total)
        rates: Array = self.peak * np.minimum(1, np.minimum(rising, falling))
        return rates


@lru_cache
def constant(rate: float, steps: int) -> Array:
    """The same rate in every step: (steps,), always the same array, which cannot be written to."""
    rates = np.full(steps, rate)
    rates.flags.writeable = False
    return rates
