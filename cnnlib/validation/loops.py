"""The stages that the checks rest on: gemm's algorithm in float64, with loops for what it lacks.

A new kind of layer has plain loops before any stage has a fast operator for it. Here the loops
serve it, image by image, so that it is checked from the beginning.
"""

import dataclasses

import numpy as np

from cnnlib.engine import Stage
from cnnlib.engine.cpu import MicroBatchOperator, in_c_order, micro_batch_shape
from cnnlib.layers import KINDS, MASK, Conv, Dropout, Views
from cnnlib.stages import gemm


class LoopOperator(MicroBatchOperator):
    """A layer's own loops over every image of a micro-batch."""

    keeps_target = True

    def make_buffers(self) -> None:
        (self.layer,) = self.planned.layers
        self._given: list[Views] = []
        shape = micro_batch_shape(self.planned.target_shape, self.source.shape[-1])
        self.target = self.buffer(*shape)
        self._target_error = self.target_error = np.empty_like(self.target)

    def forward(self) -> None:
        source, target = in_c_order(self.source), in_c_order(self.target)
        self._given = [self._views(image) for image in range(source.shape[-1])]
        for image, views in enumerate(self._given):
            target[..., image] = self.layer.forward(views, source[..., image])

    def _views(self, image: int) -> Views:
        """What the layer is given besides its source: parameters and, in training, a mask."""
        if not isinstance(self.layer, Dropout) or self.moment is None:
            return self.parameters
        step, positions = self.moment
        # A short micro-batch is filled up with copies of its first image.
        position = int(positions[image if image < len(positions) else 0])
        return {MASK: self.setup.mask(self.planned.start, step, position)}

    def backward(self) -> None:
        source, target = in_c_order(self.source), in_c_order(self.target)
        target_error = in_c_order(self._target_error)
        for image in range(source.shape[-1]):
            error, gradients = self.layer.backward(
                self._given[image], source[..., image], target[..., image], target_error[..., image]
            )
            for name, gradient in gradients.items():
                self.gradients[name] += gradient
            if self.source_error is not None:
                in_c_order(self.source_error)[..., image] = error


def reference_stage(name: str) -> Stage:
    """Stage gemm in float64 on one thread, able to train every kind of layer.

    Its convolutions are the plain products, which the ones with fewer multiplications are
    compared with like those of any other stage.
    """
    return dataclasses.replace(
        gemm.STAGE,
        name=name,
        operators={
            **{(kind,): LoopOperator for kind in KINDS.values()},
            **gemm.STAGE.operators,
            (Conv,): gemm.MatrixConv,
        },
        dtype=np.float64,
        threads=1,
    )
