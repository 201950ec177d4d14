"""Layers that treat every element by itself: activation functions and dropout."""

import numpy as np

from cnnlib.engine.cpu import MicroBatchOperator, in_c_order
from cnnlib.layers import FUNCTIONS, Activation, Dropout


class WholeActivation(MicroBatchOperator):
    """target = f(source) in one operation, in place where that is allowed."""

    keeps_target = True

    def make_buffers(self) -> None:
        self.function = FUNCTIONS[self.planned.layer(Activation).function]
        self.target = self.source if self.may_overwrite else np.full_like(self.source, np.nan)
        self.target_error = self.source_error  # the operator above writes into it directly
        slope_type = self.function.slope_type or self.source.dtype
        self._slope = np.zeros(self.source.shape, slope_type)

    def forward(self) -> None:
        self.function.values(self.source, self.target, self._slope)

    def backward(self) -> None:
        if self.source_error is None:
            return
        if self.function.slopes is not None:
            self.function.slopes(self.target, self._slope)
        np.multiply(self.source_error, self._slope, out=self.source_error)


class MaskedDropout(MicroBatchOperator):
    """target = source * mask, in place where that is allowed; without dropout a copy at most."""

    def make_buffers(self) -> None:
        self.target = self.source if self.may_overwrite else np.full_like(self.source, np.nan)
        self.target_error = self.source_error  # the operator above writes into it directly
        self._mask = np.ones(self.source.shape, self.source.dtype)
        self._scale = self.source.dtype.type(self.planned.layer(Dropout).scale)

    def forward(self) -> None:
        if self.moment is None:
            if self.target is not self.source:
                np.copyto(self.target, self.source)
            return
        step, positions = self.moment
        kept = np.moveaxis(self.setup.mask(self.planned.start, step, positions), 0, -1)
        # A short micro-batch is filled up with copies of an image, whose errors are 0.
        np.multiply(kept, self._scale, out=in_c_order(self._mask)[..., : len(positions)])
        np.multiply(self.source, self._mask, out=self.target)

    def backward(self) -> None:
        if self.source_error is not None:
            np.multiply(self.source_error, self._mask, out=self.source_error)
