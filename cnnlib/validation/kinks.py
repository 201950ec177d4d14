"""Close decisions of relu and max, and how far a gradient may follow one or the other.

Relu and max decide by comparison. Between numbers that are equal but for rounding float32 and
float64 may decide differently: both are right, and their gradients differ by far more than
rounding. About one number in 100,000 is as close to zero as that, and a network of a dozen
convolutions has that many for each image. What is compared with the reference is therefore chosen
so that there is nothing close to decide:

1. Images get a little noise until they ask for no close decision (`Watch.clear`). That is enough
   for a network of a few layers, and useless where an image asks for several on average.
2. The biases below relu move a little (`Watch.settle`). The numbers of one channel, over all
   positions and images, have gaps between them, and each bias takes the nearest gap that is wide
   enough to zero. Layers are done in turn from the images up, as each changes all above it. A
   stage that is right is right at these parameters too, and one that is wrong is wrong there: the
   comparison loses nothing, whatever the depth, and both sides of every relu remain in use.
3. No bias changes which element of a window is the largest. An image with a close decision of max
   becomes a copy of an image without one, which is already clear in all layers below.
4. What is left, where every image has such a decision, is allowed for: `Watch.doubt` bounds the
   difference that other decisions make, element by element of the gradient.

The bound: each close decision is taken the other way by itself, and the change goes down through
the layers below as any error does; the absolute values of what it adds to the gradient are summed
up over all close decisions. A change that meets another open relu on its way down passes it. To
carry |change| through |weights| instead would be a bound for any combination, but it grows by the
square root of the fan-in with every layer: for thirteen convolutions it is beyond all use.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from cnnlib.engine import Bytes, Setup, Stage
from cnnlib.engine.cpu import MICRO_BATCH, Lane, MicroBatchEngine
from cnnlib.layers import Activation, Array, Subsample, Views, cross_entropies
from cnnlib.network import Network
from cnnlib.stages import gemm
from cnnlib.validation.loops import reference_stage

CLOSE = 3e-6
"""A decision by less than this (of the map's largest element) may fall either way in float32."""
EQUAL = 1e-12
"""A decision by less than this is between equals, in any arithmetic."""
NOISE = 16
"""Grey levels, up or down."""
NOISE_TRIES = 20
FEW_COPIES = 0.125
"""Share of a batch that may be copies of its other images."""
MARGINS = (16.0, 4.0, 1.5)
"""Times CLOSE: how far from zero a moved bias keeps all numbers; the first that is to be found
within NEARBY, or else the last."""
NEARBY = 0.5
"""Of the standard deviation of a channel's numbers."""
SETTLED_IMAGES = 256
"""Images, about, whose biases are tried with other noise."""
DOUBT_ELEMENTS = 2**28
"""Elements of all maps, once for each close decision, that may be gone through: about a minute."""
WATCHED_ELEMENTS = 2**22
"""Elements of all maps of the images watched at a time, about: 32 MiB for each copy kept."""


Flip = list[tuple[tuple[int, ...], float]]
"""What another decision adds to the errors of an operator's source: (place, change) of each."""


def _largest(maps: Array) -> Array:
    """Of each image's maps (.., N): what gaps are small beside."""
    largest: Array = np.max(np.abs(maps), axis=tuple(range(maps.ndim - 1)))
    return largest


def _images_of(elements: Array) -> Array:
    """Mask (N,) of the images with any such element."""
    images: Array = np.any(elements, axis=tuple(range(elements.ndim - 1)))
    return images


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

    @property
    def lets_through(self) -> bool:
        """Whether relu leaves anything of the images last seen."""
        return bool(self._slope.any())

    def backward(self) -> None:
        if self.source_error is not None and self.images.any():
            self._coming = self.source_error[self.open]
        super().backward()

    def flips(self) -> Iterator[Flip]:
        for place, error in zip(np.argwhere(self.open), self._coming, strict=True):
            yield [(tuple(place), float(error))]

    def open_slopes(self) -> None:
        """Let errors through, until the next `forward`, wherever another decision may do so."""
        if self.function == "relu":
            self._slope |= self.open


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
            self._coming = self.target_error.copy()
        super().backward()

    def flips(self) -> Iterator[Flip]:
        size = self.size
        for place in np.argwhere(self.open):
            y, c, x, n = map(int, place)
            row, column = y // size, x // size
            window = self.source[row * size : (row + 1) * size, c, column * size :, n][:, :size]
            down, right = divmod(int(window.argmax()), size)
            winner = (row * size + down, c, column * size + right, n)
            if winner != (y, c, x, n):
                error = float(self._coming[row, c, column, n])
                yield [((y, c, x, n), error), (winner, -error)]


def _is_relu(operator: Any) -> bool:
    return isinstance(operator, _Activation) and operator.function == "relu"


def _watching(stage: Stage) -> Stage:
    return dataclasses.replace(
        stage,
        operators={
            **stage.operators,
            (Activation,): _Activation,
            (Subsample,): _Subsample,
        },
    )


def _micro_batch_images(network: Network) -> int:
    each = sum(math.prod(shape) for shape in network.shapes)
    return max(1, min(MICRO_BATCH, WATCHED_ELEMENTS // each))


def _with_noise(images: Bytes, generator: np.random.Generator) -> Bytes:
    noise = generator.integers(-NOISE, NOISE + 1, images.shape)
    changed: Bytes = np.clip(images + noise, 0, 255).astype(np.uint8)
    return changed


def _without(images: Bytes, close: Array) -> tuple[Bytes, Array]:
    """Copies of others in the place of the images `close`, if there are others."""
    others = np.setdiff1d(np.arange(len(images)), close)
    if len(others):
        images[close] = images[np.resize(others, len(close))]
        close = close[:0]
    return images, close


def _shifts(channels: Array) -> Array:
    """What to add to all numbers of each channel (C, n) so that none of them is close to zero.

    Where none of them is positive, so that nothing above relu would depend on what is below, half
    of them become so.
    """
    largest = float(np.abs(channels).max())
    shifts = np.zeros(len(channels))
    if not (channels > 0).any():
        shifts = -np.median(channels, axis=1)
    return shifts + [
        _shift(values + shift, largest) for values, shift in zip(channels, shifts, strict=True)
    ]


def _shift(values: Array, largest: float) -> float:
    """The smallest shift that leaves a gap around zero, a wide gap if there is one nearby."""
    shift = 0.0
    for margin in MARGINS:
        gap = margin * CLOSE * largest
        sizes = np.abs(values)
        if not ((sizes < gap) & (sizes > EQUAL * largest)).any():
            return 0.0
        # Zero may lie from gap above one number to gap below the next, or outside of all.
        ordered = np.sort(values)
        lows = np.concatenate([[-np.inf], ordered + gap])
        highs = np.concatenate([ordered - gap, [np.inf]])
        zeros = np.clip(0.0, lows, highs)[lows <= highs]
        shift = -float(zeros[np.argmin(np.abs(zeros))])
        if abs(shift) <= NEARBY * values.std():
            break
    return shift


class Watch:
    """Runs images through a network in float64 and looks at the decisions."""

    def __init__(self, setup: Setup) -> None:
        stage = _watching(reference_stage("watch"))
        setup = dataclasses.replace(setup, batch_size=_micro_batch_images(setup.network))
        self._setup = setup
        self._engine = MicroBatchEngine(stage, setup)
        self._lane = self._engine.lane
        self._operators: list[Any] = self._lane.operators
        self._relus: list[Any] = [o for o in self._operators if _is_relu(o)]
        self._alive: set[int] = set()
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
        self._alive.clear()

    def asks(self, images: Bytes) -> Array:
        """Mask (n,) of the images that ask for close decisions."""
        close = np.zeros(len(images), bool)
        with np.errstate(all="ignore"), self._blas.limit(limits=1, user_api="blas"):
            for block in self._lane.micro_batches(slice(0, len(images))):
                self._lane.forward(images[block])
                for operator in self._operators:
                    if isinstance(operator, _Activation | _Subsample):
                        close[block] |= operator.images[: len(images[block])]
                self._alive |= {i for i, relu in enumerate(self._relus) if relu.lets_through}
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
            changed = _with_noise(images[close], generator)
            still = self.asks(changed)
            images[close[~still]] = changed[~still]
            if still.sum() > len(close) / 2:
                close = close[still]
                break
            close = close[still]
        return images, close

    def settle(self, images: Bytes) -> tuple[Bytes, Array]:
        """Images and biases, near those given, that ask for hardly any close decision.

        Returns (images, indices of those that still ask); `parameters` may have changed. Noise
        comes first (`clear`), and is enough for most networks of few layers. Where it leaves more
        than a few images, or relu lets nothing through at all, biases are moved too.
        """
        images, close = self.clear(images)
        few = len(images) * FEW_COPIES
        if len(close) <= few and len(self._alive) == len(self._relus):
            return _without(images, close)
        generator = np.random.default_rng(0)
        parameters, fewest = self.parameters, len(images) + 1
        best = images, parameters
        for _ in range(max(2, min(NOISE_TRIES, SETTLED_IMAGES // len(images)))):
            self.parameters = parameters
            taken, asking = self._move_biases(images)
            if len(asking) < fewest:
                fewest = len(asking)
                best = images[taken], self.parameters
            if len(asking) <= few:
                break
            images[asking] = _with_noise(images[asking], generator)
        images, self.parameters = best
        return images, np.flatnonzero(self.asks(images))

    def _move_biases(self, images: Bytes) -> tuple[Array, Array]:
        """Move each bias below relu to where none of these images has a number close to zero.

        An image that asks for a decision that no bias can change, as of max, becomes a copy of one
        that does not. Returns (indices of the images to take, indices of those that asked).
        """
        parameters = self.parameters
        views = self._engine.network.views(parameters)
        taken, asked = np.arange(len(images)), np.zeros(len(images), bool)
        maps = (images.transpose(2, 1, 3, 0) - self._setup.mean) / self._setup.deviation
        with np.errstate(all="ignore"), self._blas.limit(limits=1, user_api="blas"):
            for operator in self._operators:
                bias = self._bias_below(operator, views)
                if bias is not None:
                    channels = maps.swapaxes(0, 1) if maps.ndim == 4 else maps
                    moved = (bias + _shifts(channels.reshape(len(bias), -1))).astype(np.float32)
                    channels += (moved - bias).reshape(-1, *[1] * (channels.ndim - 1))
                    bias[:] = moved
                maps, asking = self._through(operator, maps)
                asked |= asking
                others = np.flatnonzero(~asking)
                if len(others):
                    donors = np.resize(others, asking.sum())
                    maps[..., asking], taken[asking] = maps[..., donors], taken[donors]
        self.parameters = parameters
        return taken, np.flatnonzero(asked)

    def _bias_below(self, operator: Any, views: Sequence[Views]) -> Array | None:
        """The bias that moves all that relu `operator` decides about, channel by channel."""
        if not _is_relu(operator):
            return None
        layers = self._setup.network.layers
        below = operator.planned.start - 1
        while below >= 0 and isinstance(layers[below], Subsample):  # of x + b: that of x, plus b
            below -= 1
        return views[below].get("bias") if below >= 0 else None

    def _through(self, operator: Any, maps: Array) -> tuple[Array, Array]:
        """(target of the operator for the maps (.., n) of all images, mask of those that ask)."""
        target = np.empty((*operator.target.shape[:-1], maps.shape[-1]))
        asking = np.zeros(maps.shape[-1], bool)
        for block in self._lane.micro_batches(slice(0, len(asking))):
            count = block.stop - block.start
            operator.source[..., :count] = maps[..., block]
            operator.source[..., count:] = maps[..., block.start : block.start + 1]
            operator.forward()
            target[..., block] = operator.target[..., :count]
            if isinstance(operator, _Activation | _Subsample):
                asking[block] = operator.images[:count]
        return target, asking

    def doubt(self, images: Bytes, output_error: Array) -> Array:
        """Flat vector: how much other close decisions can change each element of the gradient.

        output_error (n, classes) is the derivative by the logits. All elements are infinite where
        there are too many close decisions to go through.
        """
        total = np.zeros(self._setup.network.parameter_count)
        left = DOUBT_ELEMENTS // sum(map(math.prod, self._setup.network.shapes))
        with self._one_by_one() as lane, self._blas.limit(limits=1, user_api="blas"):
            for image, error in zip(images, output_error, strict=True):
                lane.forward(image[None])
                lane.backward(error[:, None])
                operators: list[Any] = lane.operators
                for operator in operators:
                    if isinstance(operator, _Activation):
                        operator.open_slopes()
                for index, operator in enumerate(operators):
                    if not isinstance(operator, _Activation | _Subsample):
                        continue
                    if operator.source_error is None or not operator.images.any():
                        continue
                    for flip in operator.flips():
                        left -= 1
                        if left < 0:
                            return np.full_like(total, np.inf)
                        operator.source_error.fill(0)
                        for place, change in flip:
                            operator.source_error[place] = change
                        lane.gradient.fill(0)
                        for below in reversed(operators[:index]):
                            below.backward()
                        total += np.abs(lane.gradient)
        return total

    @contextmanager
    def _one_by_one(self) -> Iterator[Lane]:
        """A lane of one image at a time."""
        setup = dataclasses.replace(self._setup, batch_size=1)
        engine = MicroBatchEngine(self._engine.stage, setup)
        engine.parameters = self.parameters
        try:
            yield engine.lane
        finally:
            engine.close()

    def doubt_of_loss(self, images: Bytes, labels: Array, batch: int) -> Array:
        """The same for the gradient of the mean loss over `batch` images, these among them."""
        error = np.empty((len(images), self._engine.network.classes))
        for block in self._lane.micro_batches(slice(0, len(images))):
            logits = self._lane.forward(images[block])
            error[block] = cross_entropies(logits, labels[block])[1].T / batch
        return self.doubt(images, error)
