"""How far other decisions at near-ties of relu and max may move a gradient, and how to avoid them.

Relu and max decide by comparison. Between numbers that are equal but for rounding float32 and
float64 may decide differently: both are right, and their gradients differ by far more than
rounding. About one number in 100,000 is as close to zero as that, and a network of a dozen
convolutions has that many for each image. What is compared with the reference is therefore chosen
so that it has no near-ties:

1. Images get a little noise until they have no near-tie (`KinkDetector.perturb`). That is enough
   for a network of a few layers, and useless where an image has several on average.
2. The biases below relu move a little (`KinkDetector.avoid_near_ties`). The numbers of one channel,
   over all positions and images, have gaps between them, and each bias moves so that the nearest
   gap that is wide enough lies at zero. Layers are done in turn from the images up, as each changes
   all above it. A stage that is right is right at these parameters too, and one that is wrong is
   wrong there: the comparison loses nothing, whatever the depth, and both sides of every relu
   remain in use.
3. No bias changes which element of a window is the largest. An image with a near-tie of max becomes
   a copy of an image without one, which is already free of them in all layers below.
4. What is left, where every image has such a near-tie, is allowed for:
   `KinkDetector.ambiguity_bound` bounds the difference that other decisions make, element by
   element of the gradient.

The bound: each near-tie is decided the other way by itself, and the change goes down through the
layers below as any error does; the absolute values of what it adds to the gradient are summed over
all near-ties. A change that meets another relu's near-tie on its way down passes it. To carry
|change| through |weights| instead would be a bound for any combination, but it grows by the square
root of the fan-in with every layer: for thirteen convolutions it is beyond all use.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from threadpoolctl import ThreadpoolController

from cnnlib.engine import Bytes, Setup
from cnnlib.engine.cpu import MICRO_BATCH, Lane, MicroBatchEngine, MicroBatchOperator, Moment
from cnnlib.layers import Array, Layer, Subsample, Views
from cnnlib.levels import for_maps
from cnnlib.network import Network
from cnnlib.validation.loops import reference_stage
from cnnlib.validation.near_ties import NEAR_TIE, OPERATORS, TIE, KinkedActivation, KinkedOperator

NOISE = 16
"""Largest change of a pixel, in grey levels, up or down."""
NOISE_TRIES = 20
FEW_COPIES = 0.125
"""Share of a batch that may be copies of its other images."""
MARGINS = (16.0, 4.0, 1.5)
"""Distances from zero, in units of NEAR_TIE, that a moved bias keeps all numbers at. The first that
a bias within NEARBY achieves is taken, or else the last."""
NEARBY = 0.5
"""Largest move of a bias, in standard deviations of its channel's numbers, for a wide margin."""
SETTLED_IMAGES = 256
"""About how many images have their biases tried with other noise."""
BOUND_ELEMENTS = 2**28
"""Most elements, of all maps and once for each near-tie, that a bound may visit: about a minute."""
MICRO_BATCH_ELEMENTS = 2**22
"""About how many elements of maps are looked at together: 32 MiB for each copy kept."""

_REFERENCE = reference_stage("kink detector")
STAGE = dataclasses.replace(_REFERENCE, operators={**_REFERENCE.operators, **OPERATORS})


class KinkDetector:
    """Runs images through a network in float64 and looks for near-ties of relu and max."""

    def __init__(self, setup: Setup) -> None:
        setup = dataclasses.replace(setup, batch_size=_micro_batch(setup.network))
        self._setup = setup
        self._mean = for_maps(setup.mean, np.float64)
        self._deviation = for_maps(setup.deviation, np.float64)
        self._engine = MicroBatchEngine(STAGE, setup)
        self._lane = self._engine.lane
        self._operators = self._lane.operators
        self._relus = [o for o in self._operators if isinstance(o, KinkedActivation)]
        self._alive: set[int] = set()
        self._blas = ThreadpoolController()  # which is slower with threads for so small products

    def __enter__(self) -> "KinkDetector":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.close()

    @property
    def parameters(self) -> Array:
        return self._engine.parameters

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._engine.parameters = vector
        self._alive.clear()

    @property
    def steps(self) -> int:
        """The number of the step whose masks of dropout are used."""
        return self._engine.steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._engine.steps = count

    def _moment(self, positions: Array) -> Moment:
        return Moment(self.steps, positions)

    def has_near_tie(self, images: Bytes, positions: Array | None = None) -> Array:
        """Mask (n,) of the images for which relu or max has to decide a near-tie.

        `positions` (n,) are those of the images in their batch; 0, 1, ... if not given.
        """
        found = np.zeros(len(images), bool)
        positions = np.arange(len(images)) if positions is None else positions
        with np.errstate(all="ignore"), self._blas.limit(limits=1, user_api="blas"):
            for part in self._lane.micro_batches(slice(0, len(images))):
                self._lane.forward(images[part], self._moment(positions[part]))
                for operator in self._operators:
                    if isinstance(operator, KinkedOperator):
                        found[part] |= operator.images[: len(images[part])]
                self._alive |= {i for i, relu in enumerate(self._relus) if relu.passes_any}
        return found

    def perturb(self, images: Bytes) -> tuple[Bytes, Array]:
        """Add noise to copies of the images that have a near-tie.

        Returns (images, indices of those that still have one). Noise is added for as long as it
        helps at least half of the images that need it.
        """
        images = np.array(images)
        generator = np.random.default_rng(0)
        tied = np.flatnonzero(self.has_near_tie(images))
        for _ in range(NOISE_TRIES):
            if not len(tied):
                break
            changed = _with_noise(images[tied], generator)
            still = self.has_near_tie(changed, tied)
            images[tied[~still]] = changed[~still]
            if still.sum() > len(tied) / 2:
                tied = tied[still]
                break
            tied = tied[still]
        return images, tied

    def avoid_near_ties(self, images: Bytes) -> tuple[Bytes, Array]:
        """Find images and biases, near those given, with hardly any near-tie.

        Returns (images, indices of those that still have one); `parameters` may have changed. Noise
        comes first (`perturb`), and is enough for most networks of few layers. Where it leaves more
        than a few images, or a relu lets nothing through at all, biases are moved too.
        """
        images, tied = self.perturb(images)
        few = len(images) * FEW_COPIES
        if len(tied) <= few and len(self._alive) == len(self._relus):
            images, left = _without(images, tied)
            # a copy has other masks than the image that it replaces
            return images, np.flatnonzero(
                self.has_near_tie(images)
            ) if self._setup.network.drops_out else left
        generator = np.random.default_rng(0)
        parameters, fewest = self.parameters, len(images) + 1
        best = images, parameters
        for _ in range(max(2, min(NOISE_TRIES, SETTLED_IMAGES // len(images)))):
            self.parameters = parameters
            taken, tied = self._move_biases(images)
            if len(tied) < fewest:
                fewest = len(tied)
                best = images[taken], self.parameters
            if len(tied) <= few:
                break
            images[tied] = _with_noise(images[tied], generator)
        images, self.parameters = best
        return images, np.flatnonzero(self.has_near_tie(images))

    def _move_biases(self, images: Bytes) -> tuple[Array, Array]:
        """Move each bias below relu to where none of these images has a number close to zero.

        An image with a near-tie that no bias can change, as of max, becomes a copy of one without.
        Returns (indices of the images to take, indices of those that had one).
        """
        parameters = self.parameters
        views = self._engine.network.views(parameters)
        taken, replaced = np.arange(len(images)), np.zeros(len(images), bool)
        maps = (images.transpose(2, 1, 3, 0) - self._mean) / self._deviation
        with np.errstate(all="ignore"), self._blas.limit(limits=1, user_api="blas"):
            for operator in self._operators:
                bias = self._bias_below(operator, views)
                if bias is not None:
                    channels = maps.swapaxes(0, 1) if maps.ndim == 4 else maps
                    moved = (bias + _shifts(channels.reshape(len(bias), -1))).astype(np.float32)
                    channels += (moved - bias).reshape(-1, *[1] * (channels.ndim - 1))
                    bias[:] = moved
                maps, tied = self._through(operator, maps)
                replaced |= tied
                others = np.flatnonzero(~tied)
                if len(others) and not self._setup.network.drops_out:
                    donors = np.resize(others, tied.sum())
                    maps[..., tied], taken[tied] = maps[..., donors], taken[donors]
        self.parameters = parameters
        return taken, np.flatnonzero(replaced)

    def _bias_below(self, operator: MicroBatchOperator, views: Sequence[Views]) -> Array | None:
        """The bias that moves all numbers that relu `operator` decides about, by channel."""
        if not isinstance(operator, KinkedActivation):
            return None
        layers = self._setup.network.layers
        below = operator.planned.start - 1
        # subsampling x + b gives the subsampled x, plus b
        while below >= 0 and _carries_a_shift(layers[below]):
            below -= 1
        return views[below].get("bias") if below >= 0 else None

    def _through(self, operator: MicroBatchOperator, maps: Array) -> tuple[Array, Array]:
        """(target of the operator for the maps (.., n) of all images, mask of near-ties)."""
        target = np.empty((*operator.target.shape[:-1], maps.shape[-1]))
        tied = np.zeros(maps.shape[-1], bool)
        for part in self._lane.micro_batches(slice(0, len(tied))):
            count = part.stop - part.start
            operator.source[..., :count] = maps[..., part]
            operator.source[..., count:] = maps[..., part.start : part.start + 1]
            operator.moment = self._moment(np.arange(part.start, part.stop))
            operator.forward()
            target[..., part] = operator.target[..., :count]
            if isinstance(operator, KinkedOperator):
                tied[part] = operator.images[:count]
        return target, tied

    def ambiguity_bound(
        self, images: Bytes, output_error: Array, positions: Array | None = None
    ) -> Array:
        """Flat vector: how much other decisions can change each element of the gradient.

        output_error (n, classes) is the derivative by the logits, `positions` (n,) are those of
        `has_near_tie`. All elements are infinite where there are too many near-ties to go through.
        """
        positions = np.arange(len(images)) if positions is None else positions
        total = np.zeros(self._setup.network.parameter_count)
        left = BOUND_ELEMENTS // sum(map(math.prod, self._setup.network.shapes))
        with self._one_by_one() as lane, self._blas.limit(limits=1, user_api="blas"):
            for image, error, position in zip(images, output_error, positions, strict=True):
                lane.forward(image[None], self._moment(np.array([position])))
                lane.backward(error[:, None])
                for operator in lane.operators:
                    if isinstance(operator, KinkedActivation):
                        operator.pass_near_ties()
                for index, operator in enumerate(lane.operators):
                    if not isinstance(operator, KinkedOperator):
                        continue
                    if operator.source_error is None or not operator.images.any():
                        continue
                    for flip in operator.flips():
                        left -= 1
                        if left < 0:
                            return np.full_like(total, np.inf)
                        operator.source_error.fill(0)
                        for element, change in flip:
                            operator.source_error[element] = change
                        lane.gradient.fill(0)
                        for below in reversed(lane.operators[:index]):
                            below.backward()
                        total += np.abs(lane.gradient)
        return total

    @contextmanager
    def _one_by_one(self) -> Iterator[Lane]:
        """A lane of one image at a time."""
        setup = dataclasses.replace(self._setup, batch_size=1)
        engine = MicroBatchEngine(STAGE, setup)
        engine.parameters = self.parameters
        try:
            yield engine.lane
        finally:
            engine.close()

    def ambiguity_bound_of_loss(
        self, images: Bytes, labels: Array, batch: int, positions: Array | None = None
    ) -> Array:
        """`ambiguity_bound` for the gradient of the mean loss over `batch` images, with these."""
        loss = self._setup.loss_function
        positions = np.arange(len(images)) if positions is None else positions
        error = np.empty((len(images), self._engine.network.classes))
        for part in self._lane.micro_batches(slice(0, len(images))):
            logits = self._lane.forward(images[part], self._moment(positions[part]))
            error[part] = loss.many(logits, labels[part])[1].T / batch
        return self.ambiguity_bound(images, error, positions)


def _carries_a_shift(layer: Layer) -> bool:
    """Whether a number added to all elements of the layer's source is added to its target too."""
    return isinstance(layer, Subsample) and (layer.method == "max" or not any(layer.padding))


def _micro_batch(network: Network) -> int:
    """Images that are run through the network together."""
    each = sum(math.prod(shape) for shape in network.shapes)
    return max(1, min(MICRO_BATCH, MICRO_BATCH_ELEMENTS // each))


def _with_noise(images: Bytes, generator: np.random.Generator) -> Bytes:
    noise = generator.integers(-NOISE, NOISE + 1, images.shape)
    changed: Bytes = np.clip(images + noise, 0, 255).astype(np.uint8)
    return changed


def _without(images: Bytes, tied: Array) -> tuple[Bytes, Array]:
    """Put copies of other images in the place of the images `tied`, if there are others."""
    others = np.setdiff1d(np.arange(len(images)), tied)
    if len(others):
        images[tied] = images[np.resize(others, len(tied))]
        tied = tied[:0]
    return images, tied


def _shifts(channels: Array) -> Array:
    """Summands for each channel of (C, n), after which none of its numbers is close to zero.

    Where no number at all is positive, so that nothing above relu would depend on what is below,
    half of them become so.
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
        gap = margin * NEAR_TIE * largest
        sizes = np.abs(values)
        if not ((sizes < gap) & (sizes > TIE * largest)).any():
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
