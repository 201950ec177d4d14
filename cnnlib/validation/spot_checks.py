"""Checks that tests make of an engine by itself; a measurement makes those of `trajectory`."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cnnlib.engine import Bytes, Engine, Stage
from cnnlib.layers import Array
from cnnlib.stages import naive
from cnnlib.validation.parity import LOOP_IMAGES, Expected, compare_gradient, require_certainty
from cnnlib.validation.reference import FAST_REFERENCE, Referee
from cnnlib.validation.tolerances import MOST_AMBIGUITY
from cnnlib.validation.verdicts import require

FIVE_STEPS_BOUND = 1e-4
"""Largest difference of any weight after five steps."""
DIFFERENCE_BOUND = 1e-6
"""Error of a finite difference in float64, relative to the largest derivative: step^2 and
eps / step, balanced."""
DIFFERENCE_STEP = 1e-5


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
    velocity_ambiguity, ambiguity = np.zeros((2, engine.network.parameter_count))
    losses = []
    with Referee(setup) as referee:
        referee.parameters = engine.parameters.astype(np.float64)
        referee.steps = engine.steps
        images, _ = referee.avoid_near_ties(images)
        detector, reference = referee.detector, referee.reference
        parameters = engine.parameters = referee.parameters
        for start in range(0, len(order), setup.batch_size):
            batch = slice(start, start + setup.batch_size)
            detector.parameters, detector.steps = reference.parameters, reference.steps
            seen[batch], tied = detector.perturb(images[order[batch]])
            velocity_ambiguity *= setup.momentum
            velocity_ambiguity += detector.ambiguity_bound_of_loss(
                seen[batch][tied], labels[batch][tied], setup.batch_size, tied
            )
            ambiguity += setup.learning_rate * velocity_ambiguity
            reference.load(seen[batch], labels[batch])
            losses.append(reference.train(np.arange(setup.batch_size)))
        right = reference.parameters
    engine.load(seen, labels)
    error = abs(engine.train(np.arange(len(order))) - float(np.mean(losses)))
    after = engine.parameters
    # The most that a weight's ambiguity does to the loss; later steps see changed weights.
    slack = float(np.abs(right - parameters) @ ambiguity) / setup.learning_rate
    require(engine, "the mean loss of five steps", error, FIVE_STEPS_BOUND + slack)
    for p in engine.network.parameters:
        part = slice(p.offset, p.offset + p.size)
        moved = float(np.abs(right - parameters)[part].max())
        moved = max(moved, FIVE_STEPS_BOUND / MOST_AMBIGUITY)
        require_certainty(engine, f"{p.name} after five steps", ambiguity[part], moved)
        errors = np.abs(after[part] - right[part])
        errors -= np.minimum(errors, ambiguity[part])
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
        compare_gradient(engine, "the gradient of {} on integers", found, Expected(right, 0))


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
