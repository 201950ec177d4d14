"""Do a few steps of one `train` call end with the weights that gradient descent ends with?

`check_steps` compares them with the rule written out in float64, from changed weights and, where
the training has a momentum, from a velocity that is not zero. A large batch would hide one image,
and its float64 reference would take seconds. Batches are therefore made of a few *loud* images and
many *silent* ones: the biases of the last layer are shifted until the network is sure of one class,
which makes the error of images of that class vanish and that of all others as large as it can be.
The first and the last position of each batch are always loud. An image that is left out, used twice
or used in another step changes the result by about one in the number of loud images, whatever the
batch size. Images that ask relu or max to decide a near-tie (cnnlib/validation/kinks.py) are
avoided.

`check_real_steps` compares ordinary batches with the rule applied to what the stage's own
`gradient` returns, which `validate` has compared with the reference. That covers paths that exist
in `train` alone, such as a compiled or captured step.

Both allow a stage whose products are coarser than float32 what cnnlib/validation/coarse.py measures
for its network and these batches.
"""

import dataclasses
import math

import numpy as np

from cnnlib.engine import Bytes, Engine, ImageByImage
from cnnlib.layers import Array
from cnnlib.network import Parameter
from cnnlib.validation.coarse import coarse_references, length, spread_of, weight_errors
from cnnlib.validation.reference import Referee
from cnnlib.validation.tolerances import (
    COARSE,
    COARSE_STEPS,
    FACTOR,
    MOST_AMBIGUITY,
    SPREAD,
    is_conv_weight,
    longest_sum,
    machine_epsilon,
)
from cnnlib.validation.trial import LOUD, Trial
from cnnlib.validation.verdicts import Unjudged, failure, unjudged

STEPS = 3
"""Steps of one call that are compared with the reference."""
FEWER_STEPS = 2
"""Such steps of stages that train image by image and take seconds for a batch."""
EXACT = 1e-3
"""Share of the way travelled by which weights may be off after a few steps. Rounding reaches about
1e-6 of it, a loud image that is left out changes a twentieth."""
REAL_STEPS = 2
"""Steps on ordinary batches that are compared with the stage's own gradients."""
REAL_SHARE = 0.02
"""EXACT for ordinary batches, in which relu and max may decide a few near-ties the other way."""
LOSS_SHARE = 1e-3
"""Relative difference of a mean loss, whose sum in float32 is split differently in a replay."""


def check_steps(engine: Engine, images: Bytes, labels: Bytes, seed: int = 0) -> float:
    """Compare STEPS steps of one `train` call with the reference; the largest error as a share.

    `images` and `labels` are what the engine has loaded, and its parameters are those from which
    the weights are derived; the engine is left trained. Raises ValidationFailed naming stage,
    network, parameter and error; Unjudged where the steps are too small to show in the stage's
    numbers, or where every image has near-ties.
    """
    setup, network = engine.setup, engine.network
    steps = _steps(engine, len(labels))
    random = np.random.default_rng((seed, setup.batch_size))
    few = dataclasses.replace(setup, batch_size=LOUD + 4)
    with (
        np.errstate(all="ignore"),
        Referee(few) as referee,
        coarse_references(few, engine.stage.rounding) as coarse,
    ):
        began = engine.steps
        trial = Trial(engine, referee, (images, labels), random, steps, coarse)
        batches = [trial.step(0)]
        while len(batches) < steps and trial.tame and trial.affordable:
            batches.append(trial.step(len(batches)))
    right = trial.right
    if not _representable(right.parameters, engine):
        return 0.0  # the training will be found to diverge
    order, steps = np.concatenate(batches), len(batches)
    engine.parameters, engine.velocity = trial.start, trial.start_velocity
    engine.steps = began
    loss = engine.train(order, trial.rates[:steps])
    what = f"the mean loss of {steps} steps"
    share = compare_loss(engine, loss, right.loss / steps, what, trial.spread_of_loss / steps)
    after = engine.parameters.astype(np.float64)
    judged = False
    for p in network.parameters:
        # what float32 cannot show of a small step onto large weights
        hidden = steps * machine_epsilon(engine.stage) * length(p.part(right.parameters))
        hidden += length(p.part(trial.ambiguity)) + trial.spread(p)
        travelled = trial.travelled[p.name]
        judged |= hidden < travelled / 2
        error = length(p.part(after) - p.part(right.parameters))
        allowed = _exactness(engine, p) * travelled + hidden
        if not error <= allowed:
            raise failure(
                engine,
                f"{p.name} after {steps} steps of one call is off by {error:.3g}, allowed "
                f"{allowed:.3g}, where the reference's steps add up to {travelled:.3g}",
            )
        share = max(share, error / allowed if allowed else 0.0)
    if not judged and coarse:
        raise _left_open(engine)
    if not judged and trial.ambiguity.any():
        raise unjudged(
            engine,
            "near-ties of relu or max in all images leave steps open",
            "fewer layers, tanh for relu, mean for max",
        )
    if not judged:
        raise Unjudged(
            f"stage '{engine.stage.name}' on network '{network.name}': steps of batch size "
            f"{setup.batch_size} at training.learning_rate {setup.learning_rate:g} are too small "
            f"to be seen in its numbers; a larger training.learning_rate can be judged"
        )
    if setup.momentum:
        _compare_velocity(engine, trial)
    return share


def _steps(engine: Engine, count: int) -> int:
    """Steps to compare: no more than an epoch of the `count` images loaded has."""
    most = FEWER_STEPS if isinstance(engine, ImageByImage) else STEPS
    return max(1, min(most, count // engine.setup.batch_size))


def check_real_steps(engine: Engine, images: Bytes, labels: Bytes, seed: int = 0) -> float:
    """Compare REAL_STEPS steps of one `train` call with the rule applied to `gradient`.

    They start from the engine's weights, with a velocity as large as a gradient; the engine is left
    trained. A training whose loss is no longer finite is not compared.

    Returns the largest error as a share of what is allowed. Raises ValidationFailed, and Unjudged
    where products as coarse as the stage's leave all steps open.
    """
    setup = engine.setup
    random = np.random.default_rng((seed, setup.batch_size, 1))
    batch = setup.batch_size
    most = min(REAL_STEPS, _steps(engine, len(labels)))
    order = np.resize(random.permutation(len(labels)), most * batch)
    batches = [(images[part], labels[part]) for part in np.split(order, most)]
    began, start = engine.steps, engine.parameters
    right = _OwnSteps(engine, start, began)
    first = np.zeros_like(start)
    for step, (some, theirs) in enumerate(batches):
        loss, gradient = right.gradient(some, theirs)
        if setup.momentum and not step:
            usual = float(np.sqrt(np.mean(gradient.astype(np.float64) ** 2)))
            first[:] = usual * random.standard_normal(len(start))
            right.velocity = first.astype(np.float64)
        right.go(loss, gradient)
        if not length(right.travelled) < length(start):
            break  # from there on, errors grow too fast
    steps = len(right.losses)
    if not (np.isfinite(right.losses).all() and _representable(right.parameters, engine)):
        return 0.0  # the training will be found to diverge
    others = [
        _OwnSteps(engine, start, began, errors)
        for errors in weight_errors(engine.stage.rounding, len(start))
    ]
    for other in others:
        other.velocity = first.astype(np.float64)
        for some, theirs in batches[:steps]:
            other.go(*other.gradient(some, theirs))
    engine.parameters, engine.velocity, engine.steps = start, first, began
    loss = engine.train(order[: steps * batch], engine.rates_of(steps, None))
    mean, what = float(np.mean(right.losses)), f"the mean loss of {steps} real steps"
    means = [abs(float(np.mean(other.losses)) - mean) for other in others]
    share = compare_loss(engine, loss, mean, what, SPREAD * max(means, default=0.0))
    after = engine.parameters.astype(np.float64)
    terms = longest_sum(engine.network, batch)
    unit = FACTOR * engine.stage.slack * machine_epsilon(engine.stage) * math.sqrt(terms)
    coarse = COARSE * (engine.stage.rounding or 0.0)
    exactness = max(REAL_SHARE, unit * (engine.stage.conv_weight_slack or 1.0), coarse)
    judged = False
    for p in engine.network.parameters:
        ends, way = p.part(right.parameters), length(p.part(right.travelled))
        hidden = steps * machine_epsilon(engine.stage) * length(ends)
        spread = spread_of(ends, [p.part(other.parameters) for other in others])
        judged |= spread < MOST_AMBIGUITY * way
        error = length(p.part(after) - ends)
        allowed = exactness * way + hidden + spread
        if not error <= allowed:
            raise failure(
                engine,
                f"{p.name} after {steps} real steps at batch size {batch} is off by "
                f"{error:.3g} of {way:.3g} from what the stage's own gradients add up to",
            )
        share = max(share, error / allowed if allowed else 0.0)
    if others and not judged:
        raise _left_open(engine)
    return share


class _OwnSteps:
    """The rule of gradient descent, applied to what an engine's own `gradient` returns."""

    def __init__(
        self, engine: Engine, start: Array, began: int, errors: Array | None = None
    ) -> None:
        """`errors`: relative ones, by which the weights are off wherever a gradient is computed."""
        self._engine, self._dtype, self._began = engine, start.dtype, began
        self._factors = 1.0 if errors is None else 1 + errors
        self.parameters = start.astype(np.float64)
        self.travelled = np.zeros_like(self.parameters)
        self.velocity = np.zeros_like(self.parameters)
        self.losses: list[float] = []

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        """The mean loss of the next step's batch, and its gradient."""
        engine = self._engine
        engine.parameters = (self.parameters * self._factors).astype(self._dtype)
        engine.steps = self._began + len(self.losses)
        return engine.gradient(images, labels)

    def go(self, loss: float, gradient: Array) -> None:
        """Take the next step."""
        setup = self._engine.setup
        self.losses.append(loss)
        decay = setup.weight_decay * self.parameters
        self.velocity = setup.momentum * self.velocity + gradient + decay
        self.parameters = self.parameters - setup.learning_rate * self.velocity
        self.travelled += np.abs(setup.learning_rate * self.velocity)


def compare_loss(
    engine: Engine, found: float, right: float, what: str, spread: float = 0.0
) -> float:
    """The difference of two mean losses as a share of what is allowed: `spread`, at least.

    Raises ValidationFailed where it is more than that; `what` names the loss in the message.
    """
    coarse = COARSE * (engine.stage.rounding or 0.0)
    allowed = max(max(LOSS_SHARE, coarse) * max(1.0, abs(right)), spread)
    error = abs(found - right)
    if not error <= allowed:
        raise failure(engine, f"{what} is {found:.6g}, not {right:.6g}")
    return error / allowed


def _left_open(engine: Engine) -> Unjudged:
    return unjudged(
        engine,
        f"products as coarse as those of stage '{engine.stage.name}' leave steps open",
        "fewer layers, tanh for relu, mean for max",
    )


def _exactness(engine: Engine, parameter: Parameter) -> float:
    """Share of the way by which a few steps may be off, in the view of a parameter."""
    stage = engine.stage
    if stage.conv_weight_slack and is_conv_weight(engine, parameter):
        return max(REAL_SHARE, COARSE_STEPS * (stage.rounding or 0.0))
    return max(EXACT * stage.slack, COARSE_STEPS * (stage.rounding or 0.0))


def _compare_velocity(engine: Engine, trial: Trial) -> None:
    found = engine.velocity.astype(np.float64)
    for p in engine.network.parameters:
        right = p.part(trial.right.velocity)
        size = length(right)
        error = length(p.part(found) - right)
        if not error <= _exactness(engine, p) * size + trial.spread_of_velocity(p):
            raise failure(
                engine,
                f"the velocity of {p.name} after a few steps is off by {error:.3g} of {size:.3g}",
            )


def _representable(vector: Array, engine: Engine) -> bool:
    """Whether the stage's numbers can hold the vector, and its length squared."""
    with np.errstate(over="ignore"):
        return math.isfinite(length(vector.astype(engine.stage.dtype)))
