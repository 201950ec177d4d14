"""Does a stage compute the gradient that the reference computes?

cnnlib/validation/reference.py says what the reference is, and cnnlib/validation/tolerances.py how
far a right stage may be off.

Where relu or max have to decide between numbers that are equal but for rounding, both decisions are
right and their gradients are not near each other. Images and biases are therefore changed a little,
until there is no such decision, and a stage is judged there: see cnnlib/validation/kinks.py. What
other decisions can still change is allowed on top of rounding, for each element of the gradient by
itself. Where that is a large part of the gradient, or the gradient is zero, right and wrong stages
cannot be distinguished, and the verdict is Unjudged: nothing is said about the stage.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.engine import Bytes, Engine, ImageByImage, OwnLoop, Setup
from cnnlib.errors import ConfigError
from cnnlib.layers import Array
from cnnlib.network import Network
from cnnlib.stages import naive
from cnnlib.validation.coarse import coarse_references, length, spread_of
from cnnlib.validation.reference import Referee
from cnnlib.validation.tolerances import (
    COARSE,
    MOST_AMBIGUITY,
    further_slack,
    gradient_bound,
)
from cnnlib.validation.verdicts import ValidationFailed, failure, require, unjudged

FEW_ERRORS = 6
"""Images whose errors alone are propagated back, to see that none is left out of a batch."""
LOOP_IMAGES = 3
"""Images on which the fast reference is compared with the loops: 60 ms each for LeNet-5."""
LOOP_ELEMENTS = 30_000
"""Elements of all maps of a network whose loops take up to 0.2 s an image."""


@dataclass(frozen=True)
class Expected:
    """The reference's gradient, and how far from it a right one may be."""

    gradient: Array
    unit: float
    """Rounding, as a share of the largest element of a parameter's gradient."""
    ambiguity: Array | None = None
    """What near-ties may change, for each element; None where there are none."""


def validate(engine: Engine, images: Bytes, labels: Bytes) -> float:
    """Compare loss and gradient of a batch near `images`, at most batch_size of them.

    Biases are near the engine's, too, and all other parameters are the engine's, which has them
    again afterwards. Returns the largest error as a share of its bound. Raises ValidationFailed
    naming stage, network, parameter, error and bound, and Unjudged naming the network.
    """
    given = engine.parameters
    _check_fast_reference(engine.setup)
    with Referee(engine.setup) as referee:
        referee.parameters, referee.steps = given.astype(np.float64), engine.steps
        images, tied = referee.avoid_near_ties(images)
        engine.parameters = referee.parameters
        try:
            return _Comparison(engine, referee, images, labels, tied).make()
        finally:
            engine.parameters = given


def compare_logits(engine: Engine, images: Bytes) -> None:
    """Compare the logits of `images`, which give a test accuracy, at the engine's parameters.

    For engines that go forward by another way than their steps. Raises ValidationFailed.
    """
    with Referee(engine.setup) as referee:
        referee.parameters = engine.parameters.astype(np.float64)
        right = referee.reference.logits(images)
    unit = max(gradient_bound(engine, len(images)), COARSE * (engine.stage.rounding or 0.0))
    error = float(np.abs(engine.logits(images) - right).max())
    require(engine, "the logits of a batch", error, unit * max(1.0, float(np.abs(right).max())))


@dataclass(frozen=True)
class _Comparison:
    """An engine beside the referee, at the same parameters, and a batch with few near-ties."""

    engine: Engine
    referee: Referee
    images: Bytes
    labels: Bytes
    tied: Array
    """Indices of the images that still have a near-tie."""

    def make(self) -> float:
        """The largest error as a share of its bound."""
        engine, count = self.engine, len(self.images)
        ambiguity = self.referee.detector.ambiguity_bound_of_loss(
            self.images[self.tied], self.labels[self.tied], count, self.tied
        )
        right_loss, right = self.referee.reference.gradient(self.images, self.labels)
        require_some(engine, right)
        found = engine.gradient(self.images, self.labels)
        if engine.stage.rounding:
            return self._whole_gradient(found[1], right)
        expected = Expected(right, gradient_bound(engine, count), ambiguity)
        share = _compare_batch(engine, found, (right_loss, expected), count)
        # The gradient of an author's loop is that of a step: check_steps asks it the same.
        if count > FEW_ERRORS and not isinstance(engine, ImageByImage | OwnLoop):
            share = max(share, self._few_errors())
        return share

    def _whole_gradient(self, found: Array, right: Array) -> float:
        """The whole gradient's distance from the right one, relative, within COARSE roundings.

        For stages that say that their products are coarser than float32: there relu and max decide
        otherwise in many places, so that single elements say nothing. Where these decisions add up
        to more, the distance may be SPREAD times that of a reference with as coarse products.
        """
        engine = self.engine
        allowed, size = COARSE * (engine.stage.rounding or 0.0), length(right)
        distance = length(found - right) / size
        if distance > allowed:
            spread = self._spread(right) / size
            if spread > MOST_AMBIGUITY:
                raise unjudged(
                    engine,
                    f"products as coarse as those of stage '{engine.stage.name}' leave "
                    f"{spread:.3g} of the gradient open",
                    "fewer layers, tanh for relu, mean for max",
                )
            allowed = max(allowed, spread)
        return require(engine, "the whole gradient", distance, allowed)

    def _spread(self, right: Array) -> float:
        """How far coarse products may move the gradient."""
        reference, rounding = self.referee.reference, self.engine.stage.rounding
        moved = []
        with coarse_references(reference.setup, rounding) as coarse:
            for each in coarse:
                each.parameters, each.steps = reference.parameters, reference.steps
                moved.append(each.gradient(self.images, self.labels)[1])
        return spread_of(right, moved)

    def _few_errors(self) -> float:
        """Back-propagate errors of a few images alone, the batch's first and last among them.

        The rounding that must be allowed in the gradient of a large batch could hide that an image
        is left out or counted twice.
        """
        engine, images = self.engine, self.images
        generator = np.random.default_rng(0)
        others = generator.choice(len(images) - 2, FEW_ERRORS - 2, replace=False) + 1
        few = np.array([0, *others, len(images) - 1])
        error = np.zeros((len(images), engine.network.classes))
        error[few] = generator.standard_normal((len(few), engine.network.classes))
        found = engine.backward(images, error)
        right = self.referee.reference.backward(images[few], error[few], few)
        tied = np.intersect1d(self.tied, few)
        ambiguity = self.referee.detector.ambiguity_bound(images[tied], error[tied], tied)
        what = f"the gradient of {{}} for errors of a few images in a batch of {len(images)}"
        expected = Expected(right, gradient_bound(engine, len(few)), ambiguity)
        return compare_gradient(engine, what, found, expected)


_checked: set[Network] = set()


def _check_fast_reference(setup: Setup) -> None:
    """Compare it with the loops on noise, once for each network; Unjudged where they disagree."""
    if setup.network in _checked:
        return
    network = _small(setup.network)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (LOOP_IMAGES, *network.input_shape), dtype=np.uint8)
    labels = generator.integers(0, network.classes, LOOP_IMAGES).astype(np.uint8)
    few = dataclasses.replace(
        setup, network=network, batch_size=LOOP_IMAGES, mean=127.5, deviation=73.9
    )
    with Referee(few) as referee, naive.STAGE.engine(naive.STAGE, few) as loops:
        referee.parameters = network.initial_parameters(0, np.float64)
        images, _ = referee.avoid_near_ties(images)
        fast, loops.parameters = referee.reference, referee.parameters
        # errors of a loss would nearly cancel each other where all images look alike to a network
        error = generator.standard_normal((LOOP_IMAGES, network.classes))
        found, (right_loss, right) = (
            (e.gradient(images, labels)[0], e.backward(images, error)) for e in (fast, loops)
        )
        expected = Expected(right, gradient_bound(fast, LOOP_IMAGES))
        try:
            _compare_batch(fast, found, (right_loss, expected), LOOP_IMAGES)
        except ValidationFailed as error:
            why = f"the two references disagree ({error})"
            raise unjudged(fast, why, "fewer layers") from None
    _checked.add(setup.network)


def _small(network: Network) -> Network:
    """`network`, or its layers on smaller images where loops over its maps would take too long."""
    channels, height, width = network.input_shape
    for rows in range(height, 0, -1):
        try:
            shape = (channels, rows, ceil_div(rows * width, height))
            smaller = dataclasses.replace(network, input_shape=shape)
        except ConfigError:
            continue  # a kernel or window no longer fits
        if sum(math.prod(shape) for shape in smaller.shapes[1:]) <= LOOP_ELEMENTS:
            return smaller
    return network


def _compare_batch(
    engine: Engine, found: tuple[float, Array], right: tuple[float, Expected], count: int
) -> float:
    """Compare (loss, gradient) of `count` images; the largest error as a share of its bound."""
    (loss, gradient), (right_loss, expected) = found, right
    bound = expected.unit * max(1.0, abs(right_loss))
    share = require(engine, f"the loss at batch size {count}", abs(loss - right_loss), bound)
    what = f"the gradient of {{}} at batch size {count}"
    return max(share, compare_gradient(engine, what, gradient, expected))


def compare_gradient(engine: Engine, what: str, found: Array, expected: Expected) -> float:
    """Compare the gradient of every parameter; the largest error as a share of its bound.

    `what` has a {} for the parameter's name. Raises ValidationFailed or Unjudged.
    """
    right, ambiguity = expected.gradient, expected.ambiguity
    if found.shape != right.shape:
        raise failure(engine, what.format("all") + f" has shape {found.shape}, not {right.shape}")
    share = 0.0
    for p in engine.network.parameters:
        part = slice(p.offset, p.offset + p.size)
        error, largest = np.abs(found[part] - right[part]), float(np.abs(right[part]).max())
        if ambiguity is not None:
            require_certainty(engine, what.format(p.name), ambiguity[part], largest)
            error = error - np.minimum(error, ambiguity[part])
        bound = expected.unit * largest * further_slack(engine, p)
        share = max(share, require(engine, what.format(p.name), error.max(), bound))
    return share


def require_certainty(engine: Engine, what: str, ambiguity: Array, largest: float) -> None:
    """Raise Unjudged where near-ties leave so much open that a comparison would say nothing."""
    most = float(ambiguity.max())
    if most > MOST_AMBIGUITY * largest:
        open_part = f"{most:.3g} of {largest:.3g}" if math.isfinite(most) else "too much"
        raise unjudged(
            engine,
            f"near-ties of relu or max leave {open_part} open in {what}",
            "tanh for relu, mean for max, fewer or smaller maps",
        )


def require_some(engine: Engine, right: Array) -> None:
    """Raise Unjudged unless there is something to compare, in numbers that the stage can hold.

    A gradient is zero below a relu that lets nothing through, and it may vanish below many layers.
    """
    numbers = np.finfo(np.dtype(engine.stage.dtype))
    for p in engine.network.parameters:
        largest = float(np.abs(right[p.offset : p.offset + p.size]).max())
        if largest < numbers.tiny / numbers.eps:
            size = f"{largest:.3g} at most, too small for {numbers.dtype}" if largest else "zero"
            raise unjudged(
                engine,
                f"the gradient of {p.name} is {size} for all images looked at",
                "fewer layers, or more maps or units",
            )
