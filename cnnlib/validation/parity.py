"""Does a stage compute what the reference computes? The only place that knows tolerances.

The reference is the layers' own loops in float64 (stage `naive`). They are slow, so batches are
compared with stage `gemm` in float64, which is itself compared with the loops first, on a few
images, once for each network in a process.

Two exact computations of a float32 gradient differ by rounding. Rounding errors of a sum of n terms
grow like sqrt(n) (Higham, Accuracy and Stability of Numerical Algorithms, section 2.8), hence

    bound = FACTOR * eps * sqrt(n * max(1, l / USUAL_LAYERS)) * largest element,

n the length of the network's longest sum and l the number of its layers with weights, as the errors
of one layer after another add up in the same way.

Where relu or max have to decide between numbers that are equal but for rounding, both decisions are
right and their gradients are not near each other. Images and biases are therefore changed a little,
until there is no such decision, and a stage is judged there: see cnnlib/validation/kinks.py. What
other decisions can still change is allowed on top of rounding, for each element of the gradient by
itself. Where that is a large part of the gradient, or the gradient is zero, right and wrong stages
cannot be distinguished, and the verdict is Unjudged: nothing is said about the stage.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from cnnlib.engine import Bytes, Engine, ImageByImage, Setup, Stage
from cnnlib.errors import ConfigError, UserError
from cnnlib.layers import Array, Conv
from cnnlib.network import Network, Parameter
from cnnlib.stages import naive
from cnnlib.validation.kinks import Watch
from cnnlib.validation.loops import reference_stage

FACTOR = 4.0
"""Rounding errors seen reach a sixth of the bound; wrong indices are far beyond it."""
USUAL_LAYERS = 5
"""With weights, as LeNet-5 has them: the bound is wider for networks of more."""
COARSE = 64.0
"""Roundings by which the gradient of a stage of less precision may be off, as a whole."""
SPREAD = 3.0
"""Rounding of weights and maps moved the gradients of 90 networks of 4 to 20 convolutions up to 2.2
times as far as that of the weights alone, and as far where COARSE was not enough."""
SPREAD_TRIES = 4
FIVE_STEPS_BOUND = 1e-4
"""Largest difference of any weight after five steps."""
DIFFERENCE_BOUND = 1e-6
"""Of a finite difference in float64, relative to the largest: step^2 and eps / step balanced."""
DIFFERENCE_STEP = 1e-5
FEW_ERRORS = 6
LOOP_IMAGES = 3
"""Images on which the fast reference is compared with the loops: 60 ms each for LeNet-5."""
LOOP_ELEMENTS = 30_000
"""Elements of all maps of a network whose loops take up to 0.2 s an image."""
MOST_DOUBT = 0.5
"""Share of a gradient's largest element that close decisions may leave open: a judgement, not a
bound derived from anything. Beyond it validation fails rather than vouch for so little."""

FAST_REFERENCE = reference_stage("gemm in float64")


class ValidationFailed(UserError):
    """A stage computes something else than the reference."""


class Unjudged(UserError):
    """Right and wrong look alike here; the message says what to change."""


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
    """Compare loss and gradient of a batch near `images`, at most batch_size of them.

    Biases are near the engine's, too, and all other parameters are the engine's, which has them
    again afterwards. Returns the largest error as a share of its bound. Raises ValidationFailed
    naming stage, network, parameter, error and bound, and Unjudged naming the network.
    """
    setup, given = engine.setup, engine.parameters
    _check_fast_reference(setup)
    with Watch(setup) as watch, FAST_REFERENCE.engine(FAST_REFERENCE, setup) as reference:
        watch.parameters = given.astype(np.float64)
        images, close = watch.settle(images)
        reference.parameters = watch.parameters
        engine.parameters = watch.parameters
        try:
            doubt = watch.doubt_of_loss(images[close], labels[close], len(images))
            right_loss, right = reference.gradient(images, labels)
            require_some(engine, right)
            loss, gradient = engine.gradient(images, labels)
            if engine.stage.rounding:
                return _compare_norms(engine, reference, images, labels, gradient, right)
            share = _compare_gradients(
                engine, (loss, gradient), (right_loss, right), len(images), doubt
            )
            few = len(images) > FEW_ERRORS and not isinstance(engine, ImageByImage)
            if few:
                share = max(share, _compare_few_errors(engine, reference, watch, images, close))
        finally:
            engine.parameters = given
    return share


_checked: set[Network] = set()


def _check_fast_reference(setup: Setup) -> None:
    """Compare it with the loops on noise, once for each network; Unjudged where they disagree."""
    if setup.network in _checked:
        return
    network = _small(setup.network)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (LOOP_IMAGES, *network.input_shape), dtype=np.uint8)
    labels = generator.integers(0, network.classes, LOOP_IMAGES).astype(np.uint8)
    few = Setup(network, LOOP_IMAGES, setup.learning_rate, mean=127.5, deviation=73.9)
    with (
        Watch(few) as watch,
        FAST_REFERENCE.engine(FAST_REFERENCE, few) as fast,
        naive.STAGE.engine(naive.STAGE, few) as loops,
    ):
        watch.parameters = network.initial_parameters(0, np.float64)
        images, _ = watch.settle(images)
        fast.parameters = loops.parameters = watch.parameters
        # errors of a loss would nearly cancel each other where all images look alike to a network
        error = generator.standard_normal((LOOP_IMAGES, network.classes))
        found, right = (
            (e.gradient(images, labels)[0], e.backward(images, error)) for e in (fast, loops)
        )
        try:
            _compare_gradients(fast, found, right, LOOP_IMAGES)
        except ValidationFailed as error:
            why = f"the two references disagree ({error})"
            raise unjudged(fast, why, "fewer layers") from None
    _checked.add(setup.network)


def _small(network: Network) -> Network:
    """`network`, or its layers on smaller images where loops over its maps would take too long."""
    channels, height, width = network.input_shape
    for rows in range(height, 0, -1):
        try:
            shape = (channels, rows, math.ceil(rows * width / height))
            smaller = dataclasses.replace(network, input_shape=shape)
        except ConfigError:
            continue  # a kernel or window no longer fits
        if sum(math.prod(shape) for shape in smaller.shapes[1:]) <= LOOP_ELEMENTS:
            return smaller
    return network


def _compare_gradients(
    engine: Engine,
    found: tuple[float, Array],
    reference: tuple[float, Array],
    count: int,
    doubt: Array | None = None,
) -> float:
    """Compare (loss, gradient) of `count` images; the largest error as a share of its bound."""
    (loss, gradient), (right_loss, right) = found, reference
    unit = _unit(engine, count)
    batch = f"at batch size {count}"
    bound = unit * max(1.0, abs(right_loss))
    share = require(engine, f"the loss {batch}", abs(loss - right_loss), bound)
    what = f"the gradient of {{}} {batch}"
    return max(share, _compare_views(engine, what, gradient, right, unit, doubt))


def _compare_norms(
    engine: Engine, reference: Engine, images: Bytes, labels: Bytes, found: Array, right: Array
) -> float:
    """The whole gradient's distance from the right one, relative, within COARSE roundings.

    For stages that say that their products are coarser than float32: there relu and max decide
    otherwise in many places, so that single elements tell nothing. In a network of more than
    USUAL_LAYERS layers these decisions add up to more; then the distance may be SPREAD times as
    large as what the same rounding of the weights alone does to the reference.
    """
    rounding = engine.stage.rounding or 0.0
    distance = float(np.linalg.norm(found - right)) / float(np.linalg.norm(right))
    allowed = COARSE * rounding
    if distance > allowed and _layers(engine.network) > USUAL_LAYERS:
        spread = SPREAD * _spread(reference, images, labels, right, rounding)
        if spread > MOST_DOUBT:
            raise unjudged(
                engine,
                f"products as coarse as those of stage '{engine.stage.name}' leave {spread:.3g} of "
                f"the gradient open",
                "fewer layers, tanh for relu, mean for max",
            )
        allowed = max(allowed, spread)
    return require(engine, "the whole gradient", distance, allowed)


def _spread(
    reference: Engine, images: Bytes, labels: Bytes, right: Array, rounding: float
) -> float:
    """The farthest that the gradient moves, relative, when all weights are off by the rounding."""
    generator = np.random.default_rng(0)
    parameters = reference.parameters
    distances = []
    for _ in range(SPREAD_TRIES):
        noise = generator.uniform(-rounding, rounding, len(parameters))
        reference.parameters = parameters * (1 + noise)
        distances.append(np.linalg.norm(reference.gradient(images, labels)[1] - right))
    reference.parameters = parameters
    return float(max(distances) / np.linalg.norm(right))


def _compare_few_errors(
    engine: Engine, reference: Engine, watch: Watch, images: Bytes, close: Array
) -> float:
    """Back-propagate errors of a few images alone, the first and the last of the batch among them.

    The rounding that must be allowed in the gradient of a large batch could hide that an image is
    left out or counted twice.
    """
    generator = np.random.default_rng(0)
    others = generator.choice(len(images) - 2, FEW_ERRORS - 2, replace=False) + 1
    few = np.array([0, *others, len(images) - 1])
    error = np.zeros((len(images), engine.network.classes))
    error[few] = generator.standard_normal((len(few), engine.network.classes))
    found, right = engine.backward(images, error), reference.backward(images[few], error[few])
    unit = _unit(engine, len(few))
    what = f"the gradient of {{}} for errors of a few images in a batch of {len(images)}"
    close = np.intersect1d(close, few)
    doubt = watch.doubt(images[close], error[close])
    return _compare_views(engine, what, found, right, unit, doubt)


def _unit(engine: Engine, count: int) -> float:
    """The bound for a gradient of `count` images, as a share of its largest element."""
    network = engine.network
    terms = longest_sum(network, count) * max(1.0, _layers(network) / USUAL_LAYERS)
    return FACTOR * _eps(engine) * math.sqrt(terms)


def _layers(network: Network) -> int:
    """Layers with weights."""
    return len({p.layer for p in network.parameters})


def _eps(engine: Engine) -> float:
    return engine.stage.slack * float(np.finfo(np.dtype(engine.stage.dtype)).eps)


def _compare_views(
    engine: Engine,
    what: str,
    found: Array,
    right: Array,
    unit: float,
    doubt: Array | None = None,
) -> float:
    """Every parameter's view within `unit` of its largest element, and `doubt` of each element.

    `what` has a {} for the parameter's name. Returns the largest error as a share of its bound.
    """
    if found.shape != right.shape:
        raise failure(engine, what.format("all") + f" has shape {found.shape}, not {right.shape}")
    share = 0.0
    for p in engine.network.parameters:
        part = slice(p.offset, p.offset + p.size)
        error, largest = np.abs(found[part] - right[part]), float(np.abs(right[part]).max())
        if doubt is not None:
            require_certainty(engine, what.format(p.name), doubt[part], largest)
            error = error - np.minimum(error, doubt[part])
        bound = unit * largest * _further_slack(engine, p)
        share = max(share, require(engine, what.format(p.name), error.max(), bound))
    return share


def is_conv_weight(engine: Engine, parameter: Parameter) -> bool:
    """Whether a parameter is the weight of a convolution, which stages may round more coarsely."""
    return isinstance(engine.network.layers[parameter.layer], Conv) and parameter.key == "weight"


def _further_slack(engine: Engine, parameter: Parameter) -> float:
    """Beyond the stage's slack, which `unit` has: of convolutions' weights, if it says so."""
    stage = engine.stage
    if stage.conv_weight_slack and is_conv_weight(engine, parameter):
        return stage.conv_weight_slack / stage.slack
    return 1.0


def require_certainty(engine: Engine, what: str, doubt: Array, largest: float) -> None:
    """So that a comparison which allows for close decisions still says something."""
    most = float(doubt.max())
    if most > MOST_DOUBT * largest:
        open_part = f"{most:.3g} of {largest:.3g}" if math.isfinite(most) else "too much"
        raise unjudged(
            engine,
            f"close decisions of relu or max leave {open_part} open in {what}",
            "tanh for relu, mean for max, fewer or smaller maps",
        )


def require_some(engine: Engine, right: Array) -> None:
    """So that there is something to compare, in numbers that the stage can hold.

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


def unjudged(engine: Engine, why: str, instead: str) -> Unjudged:
    """The exception, with `instead` as what to change the network to."""
    name = engine.network.name
    return Unjudged(
        f"network '{name}' cannot be judged: {why}; change networks.{name} ({instead}) or "
        f"training.seed"
    )


def require(engine: Engine, what: str, error: float, bound: float) -> float:
    """`error` as a share of `bound`; raises ValidationFailed when it is more than all of it."""
    if not error <= bound:  # so that NaN fails
        raise failure(engine, f"{what} is off by {error:.3g}, allowed {bound:.3g}")
    return float(error / bound) if bound else 0.0


def failure(engine: Engine, what: str) -> ValidationFailed:
    """The error to raise: names stage and network; `what` is a sentence without its subject."""
    return ValidationFailed(
        f"stage '{engine.stage.name}' fails validation on network '{engine.network.name}': {what}"
    )


def five_steps(engine: Engine, images: Bytes, labels: Bytes) -> None:
    """Train five steps from near the engine's parameters, at rest, and compare the weights.

    `images` become the training set, used in order, and again from the first when they run out.
    Raises ValidationFailed or Unjudged; the engine is left trained.
    """
    setup = engine.setup
    order = np.resize(np.arange(len(images)), 5 * setup.batch_size)
    seen = np.empty((len(order), *images.shape[1:]), np.uint8)
    labels = labels[order]
    engine.velocity = np.zeros(engine.network.parameter_count)
    velocity_doubt, doubt = np.zeros((2, engine.network.parameter_count))
    losses = []
    with Watch(setup) as watch, FAST_REFERENCE.engine(FAST_REFERENCE, setup) as reference:
        watch.parameters = engine.parameters.astype(np.float64)
        images, _ = watch.settle(images)
        parameters = engine.parameters = reference.parameters = watch.parameters
        for start in range(0, len(order), setup.batch_size):
            batch = slice(start, start + setup.batch_size)
            watch.parameters = reference.parameters
            seen[batch], close = watch.clear(images[order[batch]])
            velocity_doubt *= setup.momentum
            velocity_doubt += watch.doubt_of_loss(
                seen[batch][close], labels[batch][close], setup.batch_size
            )
            doubt += setup.learning_rate * velocity_doubt
            reference.load(seen[batch], labels[batch])
            losses.append(reference.train(np.arange(setup.batch_size)))
        right = reference.parameters
    engine.load(seen, labels)
    error = abs(engine.train(np.arange(len(order))) - float(np.mean(losses)))
    after = engine.parameters
    # What a weight's doubt does to the loss, at most; later steps see changed weights.
    slack = float(np.abs(right - parameters) @ doubt) / setup.learning_rate
    require(engine, "the mean loss of five steps", error, FIVE_STEPS_BOUND + slack)
    for p in engine.network.parameters:
        part = slice(p.offset, p.offset + p.size)
        moved = max(float(np.abs(right - parameters)[part].max()), FIVE_STEPS_BOUND / MOST_DOUBT)
        require_certainty(engine, f"{p.name} after five steps", doubt[part], moved)
        errors = np.abs(after[part] - right[part])
        errors -= np.minimum(errors, doubt[part])
        require(engine, f"{p.name} after five steps", errors.max(), FIVE_STEPS_BOUND)


def exact(engine: Engine, images: Bytes, output_error: Array) -> None:
    """Compare logits and the gradient for `output_error` with the reference: not a bit may differ.

    The first LOOP_IMAGES are compared with the loops, all of them with the fast reference.

    For a network without activations, with integer parameters and errors, mean 0 and deviation 1,
    all so small that no sum leaves the integers that the stage's dtype holds. Raises
    ValidationFailed.
    """
    references: list[tuple[Stage, int]] = [
        (naive.STAGE, LOOP_IMAGES),
        (FAST_REFERENCE, len(images)),
    ]
    for stage, count in references:
        some, error = images[:count], output_error[:count]
        with stage.engine(stage, dataclasses.replace(engine.setup, batch_size=count)) as reference:
            reference.parameters = engine.parameters.astype(np.float64)
            wrong = np.abs(engine.logits(some) - reference.logits(some)).max()
            require(engine, "logits of integers", wrong, 0)
            found, right = engine.backward(some, error), reference.backward(some, error)
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
            require(engine, f"finite difference by {name} (element {position})", error, bound)
    finally:
        engine.parameters = parameters
