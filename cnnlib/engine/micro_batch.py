"""Operators of batched CPU stages, which take many images at once, and a lane of them.

A *micro-batch* is a number of images that an operator handles by one call; its maps are meant to
stay in a core's cache from one operator to the next. A *lane* has the buffers of one micro-batch
and a gradient of its own, and works through its part of every batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from cnnlib.engine.stage import Bytes, Planned, Setup
from cnnlib.layers import Array, Shape, Views
from cnnlib.levels import for_maps


class Moment(NamedTuple):
    """When and where images are trained on, by which dropout's masks are drawn."""

    step: int
    positions: Array
    """(n,) The place of each image in its batch."""


class MicroBatchOperator(ABC):
    """One layer over a micro-batch of N images; its buffers are made once, with the operator.

    Maps are stored (H, C, W, N), vectors (U, N): the image is the innermost index, so that a row of
    a map is one long run of memory for all images together, and every product has long rows.

    `source` is the target of the operator below. `source_error` receives the derivative of the loss
    by it, or is None where that is not needed. `parameters` and `gradients` are named views of the
    flat vectors, the layer's own shapes; gradients are added to what is there.
    """

    keeps_target: ClassVar[bool] = False
    """Whether `backward` reads `target`, so that the next operator must not write over it."""

    target: Array
    target_error: Array | None
    moment: Moment | None = None
    """Set before `forward`: None where images are only read, and nothing is trained."""
    setup: Setup
    """What is trained; set by the lane as soon as the operator has been made."""

    def __init__(
        self,
        planned: Planned,
        source: Array,
        source_error: Array | None,
        parameters: Views,
        gradients: Views,
        may_overwrite: bool,
    ) -> None:
        """`may_overwrite`: the target may take the source's place."""
        self.planned = planned
        self.source = source
        self.source_error = source_error
        self.parameters = parameters
        self.gradients = gradients
        self.may_overwrite = may_overwrite
        self.make_buffers()

    @abstractmethod
    def make_buffers(self) -> None:
        """Make `target`, `target_error` (None only where no error is needed) and other buffers."""

    @abstractmethod
    def forward(self) -> None:
        """Compute `target` from `source`."""

    @abstractmethod
    def backward(self) -> None:
        """Compute `source_error` from `target_error`, and add to `gradients`.

        `target_error` may be overwritten.
        """

    def buffer(self, *shape: int) -> Array:
        """A new array of the source's dtype, full of NaN: reading before writing is noticed."""
        return np.full(shape, np.nan, self.source.dtype)


class MicroBatchFactory(Protocol):
    """What a stage's record holds for a run of layers: mostly a class of MicroBatchOperators."""

    def __call__(
        self,
        planned: Planned,
        source: Array,
        source_error: Array | None,
        parameters: Views,
        gradients: Views,
        may_overwrite: bool,
    ) -> MicroBatchOperator: ...


def micro_batch_shape(shape: Shape, images: int) -> Shape:
    """Shape in which a micro-batch of maps (C, H, W) or vectors (U,) is stored."""
    if len(shape) == 3:
        channels, height, width = shape
        return height, channels, width, images
    return *shape, images


def in_c_order(maps: Array) -> Array:
    """View of (H, C, W, N) as (C, H, W, N); vectors (U, N) as they are."""
    return maps.transpose(1, 0, 2, 3) if maps.ndim == 4 else maps


class Lane:
    """The operators and buffers of one process."""

    def __init__(
        self,
        plan: Sequence[Planned[MicroBatchFactory]],
        setup: Setup,
        size: int,
        parameters: Array,
        gradient: Array,
    ) -> None:
        """Micro-batches of `size` images; flat `parameters` are read, flat `gradient` added to."""
        network, dtype = setup.network, parameters.dtype
        self.size = size
        self.gradient = gradient
        self._mean, self._deviation = for_maps(setup.mean, dtype), for_maps(setup.deviation, dtype)
        self._source = np.full(micro_batch_shape(network.input_shape, size), np.nan, dtype)
        weights, gradients = network.views(parameters), network.views(gradient)
        self.operators: list[MicroBatchOperator] = []
        target, target_error, may_overwrite = self._source, None, True
        for planned in plan:
            start = planned.start
            operator = planned.operator(
                planned, target, target_error, weights[start], gradients[start], may_overwrite
            )
            operator.setup = setup
            self.operators.append(operator)
            target, target_error = operator.target, operator.target_error
            may_overwrite = not operator.keeps_target

    def micro_batches(self, part: slice) -> Iterator[slice]:
        """`part` of a batch, cut into micro-batches."""
        for start in range(part.start, part.stop, self.size):
            yield slice(start, min(start + self.size, part.stop))

    def forward(self, images: Bytes, moment: Moment | None = None) -> Array:
        """Logits (classes, n) of images (n, C, H, W), n at most a micro-batch.

        `moment` is given where they are trained on.
        """
        count = len(images)
        np.copyto(self._source[..., :count], images.transpose(2, 1, 3, 0))
        # A short micro-batch is filled up with its first image: old numbers may be infinite.
        self._source[..., count:] = self._source[..., :1]
        np.subtract(self._source, self._mean, out=self._source)
        np.divide(self._source, self._deviation, out=self._source)
        for operator in self.operators:
            operator.moment = moment
            operator.forward()
        return in_c_order(self.operators[-1].target).reshape(-1, self.size)[:, :count]

    def backward(self, error: Array) -> None:
        """Add the gradient of the images that `forward` saw last, for error (classes, n)."""
        target_error = self.operators[-1].target_error
        if target_error is None:
            return  # no layer has parameters
        target_error = in_c_order(target_error)
        count = error.shape[1]
        target_error[..., :count] = error.reshape(*target_error.shape[:-1], count)
        target_error[..., count:] = 0
        for operator in reversed(self.operators):
            operator.backward()
