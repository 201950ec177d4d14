"""Close decisions of relu and max, and how far a gradient may follow one or the other.

Relu and max decide by comparison. Between numbers that are equal but for rounding float32 and
float64 may decide differently: both are right, and their gradients differ by far more than
rounding. A large batch, or one image with large maps, always asks for some such decisions. So

- images are changed a little, until they ask for none (`Watch.clear`), and
- where that does not help, the difference that other decisions can make is bounded, element by
  element of the gradient (`Watch.doubt`).

The bound: at a close decision the error e that goes one way may go another, which changes the error
there by |e| at most. Layers below are linear in the error, so the change goes down through |weight|
and adds |source| times itself to the weights' gradients. Errors here are those of the reference; a
change that meets another close decision on its way down is added to |e|.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from cnnlib.engine import Bytes, Setup, Stage
from cnnlib.engine.cpu import BLOCK_IMAGES, BlockEngine, cross_entropies
from cnnlib.errors import UserError
from cnnlib.layers import Activation, Array, Conv, Dense, Subsample
from cnnlib.network import Network
from cnnlib.stages import gemm

CLOSE = 3e-6
"""A decision by less than this (of the map's largest element) may fall either way in float32."""
EQUAL = 1e-12
"""A decision by less than this is between equals, in any arithmetic."""
NOISE = 16
"""Grey levels, up or down."""
NOISE_TRIES = 20
WATCHED_ELEMENTS = 2**22
"""Elements of all maps of the images watched at a time, about: 32 MiB for each copy kept."""


def _largest(maps: Array) -> Array:
    """Of each image's maps (.., N): what gaps are small beside."""
    largest: Array = np.max(np.abs(maps), axis=tuple(range(maps.ndim - 1)))
    return largest


def _images_of(elements: Array) -> Array:
    """Mask (N,) of the images with any such element."""
    images: Array = np.any(elements, axis=tuple(range(elements.ndim - 1)))
    return images


class _Conv(gemm.MatrixConv):
    def doubt(self) -> None:
        np.abs(self._columns, out=self._columns)
        np.abs(self._weight, out=self._weight)
        self.backward()


class _Dense(gemm.MatrixDense):
    def doubt(self) -> None:
        weight = self.parameters["weight"]
        signed = weight.copy()
        np.abs(weight, out=weight)
        np.abs(self._inputs, out=self._inputs)
        self.backward()
        weight[...] = signed


class _Activation(gemm.WholeActivation):
    """`open` holds where relu's decision is close, `images` in which images there is one."""

    def make_buffers(self) -> None:
        super().make_buffers()
        self.open: Array = np.zeros(self.source.shape, bool)
        self.images: Array = np.zeros(self.source.shape[-1], bool)

    def forward(self) -> None:
        if self.function == "relu":
            gaps, largest = np.abs(self.source), _largest(self.source)
            self.open = (gaps > EQUAL * largest) & (gaps < CLOSE * largest)
            self.images = _images_of(self.open)
        super().forward()

    def backward(self) -> None:
        if self.source_error is not None and self.images.any():
            self._size = np.abs(self.source_error)
        super().backward()

    def doubt(self) -> None:
        doubt = self.source_error
        if doubt is None or not self.images.any():
            return super().backward()
        either_way = (doubt + self._size)[self.open]
        super().backward()
        doubt[self.open] = either_way
        return None


class _Subsample(gemm.SlicedSubsample):
    """`open` holds which elements may win a close decision."""

    def make_buffers(self) -> None:
        super().make_buffers()
        self.open: Array = np.zeros(self.source.shape, bool)
        self.images: Array = np.zeros(self.source.shape[-1], bool)

    def forward(self) -> None:
        super().forward()
        if self.method == "max":
            gaps, largest = self._whole(self.target) - self.source, _largest(self.source)
            near = gaps < CLOSE * largest
            rivals = near & (gaps > EQUAL * largest)
            self.images = _images_of(rivals)
            parts = [part for row in self.along_y(rivals) for part in self.along_x(row)]
            self.open = near & self._whole(np.logical_or.reduce(parts))

    def _whole(self, windows: Array) -> Array:
        """Each window's value at all of its elements."""
        return windows.repeat(self.size, axis=0).repeat(self.size, axis=2)

    def backward(self) -> None:
        if self.target_error is not None and self.images.any():
            self._size = np.abs(self.target_error)
        super().backward()

    def doubt(self) -> None:
        if self.target_error is None or self.source_error is None or not self.images.any():
            return super().backward()
        either_way = self._whole(self.target_error + self._size)[self.open]
        super().backward()
        self.source_error[self.open] = either_way
        return None


def _watching(stage: Stage) -> Stage:
    return dataclasses.replace(
        stage,
        operators={
            **stage.operators,
            (Conv,): _Conv,
            (Dense,): _Dense,
            (Activation,): _Activation,
            (Subsample,): _Subsample,
        },
    )


def _block_images(network: Network) -> int:
    each = sum(math.prod(shape) for shape in network.shapes)
    return max(1, min(BLOCK_IMAGES, WATCHED_ELEMENTS // each))


class Watch:
    """Runs images through a network in float64 and looks at the decisions."""

    def __init__(self, setup: Setup) -> None:
        stage = _watching(
            dataclasses.replace(gemm.STAGE, name="watch", dtype=np.float64, threads=1)
        )
        setup = dataclasses.replace(setup, batch_size=_block_images(setup.network))
        self._engine = BlockEngine(stage, setup)
        self._lane = self._engine.lane
        self._operators: list[Any] = self._lane.operators
        self._blas = ThreadpoolController()  # which is slower with threads for so small products

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.close()

    @property
    def parameters(self) -> Array:
        return self._engine.parameters

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._engine.parameters = vector

    def asks(self, images: Bytes) -> Array:
        """Mask (n,) of the images that ask for close decisions."""
        close = np.zeros(len(images), bool)
        with np.errstate(all="ignore"), self._blas.limit(limits=1, user_api="blas"):
            for block in self._lane.blocks(slice(0, len(images))):
                self._lane.forward(images[block])
                for operator in self._operators:
                    if isinstance(operator, _Activation | _Subsample):
                        close[block] |= operator.images[: len(images[block])]
        return close

    def clear(self, images: Bytes) -> tuple[Bytes, Array]:
        """(copy of the images with noise on those that ask, indices of those that still do).

        Noise is added for as long as it helps at least half of the images that need it.
        """
        images = np.array(images)
        generator = np.random.default_rng(0)
        close = np.flatnonzero(self.asks(images))
        for _ in range(NOISE_TRIES):
            if not len(close):
                break
            noise = generator.integers(-NOISE, NOISE + 1, images[close].shape)
            changed = np.clip(images[close] + noise, 0, 255).astype(np.uint8)
            still = self.asks(changed)
            images[close[~still]] = changed[~still]
            if still.sum() > len(close) / 2:
                close = close[still]
                break
            close = close[still]
        return images, close

    def doubt(self, images: Bytes, output_error: Array) -> Array:
        """Flat vector: how much other close decisions can change each element of the gradient.

        output_error (n, classes) is the derivative by the logits. Raises UserError for a layer
        kind that this module does not know.
        """
        gradient = self._lane.gradient
        total = np.zeros_like(gradient)
        for block in self._lane.blocks(slice(0, len(images))):
            self._lane.forward(images[block])
            self._lane.backward(output_error[block].T)
            gradient.fill(0)
            last = self._operators[-1].target_error
            if last is None:
                continue
            last.fill(0)
            for operator in reversed(self._operators):
                if not hasattr(operator, "doubt"):
                    raise UserError(
                        f"close decisions are not followed through {operator.planned.name}"
                    )
                operator.doubt()
            total += gradient
        return total

    def doubt_of_loss(self, images: Bytes, labels: Array, batch: int) -> Array:
        """The same for the gradient of the mean loss over `batch` images, these among them."""
        error = np.empty((len(images), self._engine.network.classes))
        for block in self._lane.blocks(slice(0, len(images))):
            logits = self._lane.forward(images[block])
            error[block] = cross_entropies(logits, labels[block])[1].T / batch
        return self.doubt(images, error)
