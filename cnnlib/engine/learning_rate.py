"""The learning rate over the course of a training: constant, or one cycle."""

from dataclasses import dataclass

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

        Epochs beyond the last one of a cycle have the rates of the last.
        """
        if self.warmup is None:
            return np.full(steps, self.peak)
        total = steps * epochs
        done = (min(epoch, epochs) - 1) * steps + np.arange(steps)
        rising = (done + 1) / max(1.0, self.warmup * total)
        falling = (total - done) / max(1.0, (1 - self.warmup) * total)
        rates: Array = self.peak * np.minimum(1, np.minimum(rising, falling))
        return rates
