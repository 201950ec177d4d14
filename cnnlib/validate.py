"""Does a stage compute what the reference computes? The only place that knows tolerances.

The reference is the layers' own loops in float64 (stage `naive`). They are slow, so batches are
compared with stage `gemm` in float64, which is itself compared with the loops first, on a few
images, once for each network in a process.

Two exact computations of a float32 gradient differ by rounding. Rounding errors of a sum of n terms
grow like sqrt(n) (Higham, Accuracy and Stability of Numerical Algorithms, section 2.8), hence

    bound = FACTOR * eps * sqrt(n) * largest element,   n the length of the network's longest sum.

Where relu or max have to decide between numbers that are equal but for rounding, both decisions are
right and their gradients are not near each other. Such images are therefore never compared
(`clear_images`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from cnnlib.engine import Bytes, Engine, Setup
from cnnlib.engine.cpu import BLOCK_IMAGES, BlockEngine
from cnnlib.errors import UserError
from cnnlib.layers import Activation, Array, Conv, Subsample
from cnnlib.network import Network
from cnnlib.stages import gemm, naive

FACTOR = 4.0
"""Rounding errors seen reach a sixth of the bound; wrong indices are far beyond it."""
FIVE_STEPS_BOUND = 1e-4
"""Largest difference of any weight after five steps."""
DIFFERENCE_BOUND = 1e-6
"""Of a finite difference in float64, relative to the largest: step^2 and eps / step balanced."""
DIFFERENCE_STEP = 1e-5
CLOSE = 3e-6
"""A decision by less than this (of the map's largest element) may fall either way in float32."""
EQUAL = 1e-12
"""A decision by less than this is between equals, in any arithmetic."""
FEW_ERRORS = 6
NOISE = 16
"""Grey levels, up or down."""
NOISE_TRIES = 30
LOOP_IMAGES = 3
"""Images on which the fast reference is compared with the loops: 60 ms each for LeNet-5."""

FAST_REFERENCE = dataclasses.replace(
    gemm.STAGE, name="gemm in float64", dtype=np.float64, threads=1
)


class ValidationFailed(UserError):
    """A stage computes something else than the reference."""


def longest_sum(network: Network, batch_size: int) -> int:
    """Terms of the longest sum that training on a batch adds up, forward or backward."""
    longest = 1
    for layer, source, target in zip(
        network.layers, network.shapes, network.shapes[1:], strict=False
    ):
        if not layer.parameter_shapes(source):
            continue
        positions = math.prod(target[1:])  # that share a weight
        seen_by = target[0] * (layer.kernel**2 if isinstance(layer, Conv) else 1)
        longest = max(longest, layer.fan_in(source), positions * batch_size, seen_by)
    return longest


def validate(engine: Engine, images: Bytes, labels: Bytes) -> float:
    """Compare loss and gradient of `images`, at most batch_size, at the engine's parameters.

    Returns the largest error as a share of its bound. Raises ValidationFailed naming stage,
    network, parameter, error and bound.
    """
    setup, parameters = engine.setup, engine.parameters.astype(np.float64)
    images = clear_images(engine, images)
    _check_fast_reference(setup, parameters, images, labels)
    with FAST_REFERENCE.engine(FAST_REFERENCE, setup) as reference:
        reference.parameters = parameters
        share = _compare_gradients(engine, reference, images, labels)
        if len(images) > FEW_ERRORS and not engine.image_by_image:
            share = max(share, _compare_few_errors(engine, reference, images))
    return share


_checked: set[tuple[Network, float, float]] = set()


def _check_fast_reference(setup: Setup, parameters: Array, images: Bytes, labels: Bytes) -> None:
    key = setup.network, setup.mean, setup.deviation
    if key in _checked:
        return
    few = dataclasses.replace(setup, batch_size=LOOP_IMAGES)
    with (
        FAST_REFERENCE.engine(FAST_REFERENCE, few) as fast,
        naive.STAGE.engine(naive.STAGE, few) as loops,
    ):
        fast.parameters = loops.parameters = parameters
        _compare_gradients(fast, loops, images[:LOOP_IMAGES], labels[:LOOP_IMAGES])
    _checked.add(key)


def _compare_gradients(engine: Engine, reference: Engine, images: Bytes, labels: Bytes) -> float:
    loss, gradient = engine.gradient(images, labels)
    right_loss, right = reference.gradient(images, labels)
    unit = FACTOR * _eps(engine) * math.sqrt(longest_sum(engine.network, len(images)))
    batch = f"at batch size {len(images)}"
    bound = unit * max(1.0, abs(right_loss))
    share = _require(engine, f"the loss {batch}", abs(loss - right_loss), bound)
    return max(
        share, _compare_views(engine, f"the gradient of {{}} {batch}", gradient, right, unit)
    )


def _compare_few_errors(engine: Engine, reference: Engine, images: Bytes) -> float:
    """Back-propagate errors of a few images alone, the first and the last of the batch among them.

    The rounding that must be allowed in the gradient of a large batch could hide that an image is
    left out or counted twice.
    """
    generator = np.random.default_rng(0)
    others = generator.choice(len(images) - 2, FEW_ERRORS - 2, replace=False) + 1
    few = np.array([0, *others, len(images) - 1])
    error = np.zeros((len(images), engine.network.classes))
    error[few] = generator.standard_normal((len(few), engine.network.classes))
    found, right = engine.backward(images, error), reference.backward(images, error)
    unit = FACTOR * _eps(engine) * math.sqrt(longest_sum(engine.network, len(few)))
    what = f"the gradient of {{}} for errors of a few images in a batch of {len(images)}"
    return _compare_views(engine, what, found, right, unit)


def _eps(engine: Engine) -> float:
    return float(np.finfo(np.dtype(engine.stage.dtype)).eps)


def _compare_views(engine: Engine, what: str, found: Array, right: Array, unit: float) -> float:
    """Every parameter's view within `unit` of its largest element; `what` has a {} for its name.

    Returns the largest error as a share of its bound.
    """
    if found.shape != right.shape:
        raise _failure(engine, what.format("all") + f" has shape {found.shape}, not {right.shape}")
    share = 0.0
    for p in engine.network.parameters:
        part = slice(p.offset, p.offset + p.size)
        error, bound = np.abs(found[part] - right[part]).max(), unit * np.abs(right[part]).max()
        share = max(share, _require(engine, what.format(p.name), error, bound))
    return share


def _require(engine: Engine, what: str, error: float, bound: float) -> float:
    """`error` as a share of `bound`; raises ValidationFailed when it is more than all of it."""
    if not error <= bound:  # so that NaN fails
        raise _failure(engine, f"{what} is off by {error:.3g}, allowed {bound:.3g}")
    return float(error / bound) if bound else 0.0


def _failure(engine: Engine, what: str) -> ValidationFailed:
    return ValidationFailed(
        f"stage '{engine.stage.name}' fails validation on network '{engine.network.name}': {what}"
    )


def five_steps(engine: Engine, images: Bytes, labels: Bytes) -> None:
    """Train five steps from the engine's parameters, at rest, and compare the weights.

    `images` become the training set, used in order, and again from the first when they run out.
    Raises ValidationFailed; the engine is left trained.
    """
    setup = engine.setup
    order = np.resize(np.arange(len(images)), 5 * setup.batch_size)
    parameters = engine.parameters.astype(np.float64)
    engine.velocity = np.zeros_like(parameters)
    with FAST_REFERENCE.engine(FAST_REFERENCE, setup) as reference:
        reference.parameters = parameters
        losses = []
        for each in (engine, reference):
            each.load(images, labels)
            losses.append(each.train(order))
        after, right = engine.parameters, reference.parameters
    _require(engine, "the mean loss of five steps", abs(losses[0] - losses[1]), FIVE_STEPS_BOUND)
    for p in engine.network.parameters:
        part = slice(p.offset, p.offset + p.size)
        error = np.abs(after[part] - right[part]).max()
        _require(engine, f"{p.name} after five steps", error, FIVE_STEPS_BOUND)


def exact(engine: Engine, images: Bytes, output_error: Array) -> None:
    """Compare logits, and the gradient for `output_error`, with the loops: not a bit may differ.

    For a network without activations, with integer parameters and errors, mean 0 and deviation 1,
    all so small that no sum leaves the integers that the stage's dtype holds. Raises
    ValidationFailed.
    """
    with naive.STAGE.engine(naive.STAGE, engine.setup) as reference:
        reference.parameters = engine.parameters.astype(np.float64)
        wrong = np.abs(engine.logits(images) - reference.logits(images)).max()
        _require(engine, "logits of integers", wrong, 0)
        found = engine.backward(images, output_error)
        right = reference.backward(images, output_error)
    _compare_views(engine, "the gradient of {} on integers", found, right, 0)


def finite_differences(
    engine: Engine, images: Bytes, labels: Bytes, positions: Sequence[int] | None = None
) -> None:
    """Compare the gradient with (loss(p + h) - loss(p - h)) / 2h; for engines in float64.

    Every parameter is moved, or those at `positions` of the flat vector. Raises ValidationFailed
    naming the parameter; the engine's parameters are restored.
    """
    parameters = engine.parameters
    _, gradient = engine.gradient(images, labels)
    if positions is None:
        positions = range(len(parameters))
    bound = DIFFERENCE_BOUND * max(1.0, float(np.abs(gradient).max()))
    try:
        for position in positions:
            losses = []
            for step in (DIFFERENCE_STEP, -DIFFERENCE_STEP):
                moved = parameters.copy()
                moved[position] += step
                engine.parameters = moved
                losses.append(engine.gradient(images, labels)[0])
            difference = (losses[0] - losses[1]) / (2 * DIFFERENCE_STEP)
            name = next(
                p.name
                for p in engine.network.parameters
                if p.offset <= position < p.offset + p.size
            )
            error = abs(gradient[position] - difference)
            _require(engine, f"finite difference by {name} (element {position})", error, bound)
    finally:
        engine.parameters = parameters


class _WatchedActivation(gemm.WholeActivation):
    """Keeps which images asked relu for a close decision."""

    close: Array = np.zeros(BLOCK_IMAGES, bool)

    def forward(self) -> None:
        if self.function == "relu":
            self.close = _close(np.abs(self.source), self.source)
        super().forward()


class _WatchedSubsample(gemm.SlicedSubsample):
    """Keeps in which images a maximum was close to another element of its window."""

    close: Array = np.zeros(BLOCK_IMAGES, bool)

    def forward(self) -> None:
        super().forward()
        if self.method == "max":
            s = self.size
            largest = self.target.repeat(s, axis=0).repeat(s, axis=2)
            self.close = _close(largest - self.source, self.source)


def _close(gaps: Array, maps: Array) -> Array:
    """Images (N,) with a gap that may close by rounding but is not one between equals."""
    axes = tuple(range(maps.ndim - 1))
    gaps = gaps / np.maximum(np.abs(maps).max(axis=axes), np.finfo(maps.dtype).tiny)
    close: Array = np.any((gaps > EQUAL) & (gaps < CLOSE), axis=axes)
    return close


_WATCHING = dataclasses.replace(
    FAST_REFERENCE,
    operators={
        **FAST_REFERENCE.operators,
        (Activation,): _WatchedActivation,
        (Subsample,): _WatchedSubsample,
    },
)


def clear_images(engine: Engine, images: Bytes) -> Bytes:
    """`images` with noise on each one that asks for a close decision, until it does not.

    At the engine's parameters. Raises ValidationFailed when noise does not help.
    """
    images = np.array(images)
    generator = np.random.default_rng(0)
    watch = dataclasses.replace(engine.setup, batch_size=BLOCK_IMAGES)
    with _WATCHING.engine(_WATCHING, watch) as watching:
        watching.parameters = engine.parameters.astype(np.float64)
        close = np.arange(len(images))
        for _ in range(NOISE_TRIES):
            close = close[_asks_for_close_decisions(cast(BlockEngine, watching), images[close])]
            if not len(close):
                return images
            noise = generator.integers(-NOISE, NOISE + 1, images[close].shape)
            images[close] = np.clip(images[close] + noise, 0, 255).astype(np.uint8)
    raise _failure(engine, f"image {close[0]} leaves relu or max undecided however it is changed")


def _asks_for_close_decisions(watching: BlockEngine, images: Bytes) -> Array:
    """Mask (n,) of the images that do."""
    close = np.zeros(len(images), bool)
    for block in watching.lane.blocks(slice(0, len(images))):
        watching.gradient(images[block], np.zeros(len(images[block]), np.int64))
        for operator in watching.lane.operators:
            if isinstance(operator, _WatchedActivation | _WatchedSubsample):
                close[block] |= operator.close[: len(images[block])]
    return close
