"""All the checks that `validated` claims, in the order in which a measurement makes them.

`validate` (cnnlib/validation/parity.py) compares the loss and the gradient of one batch. What a row
claims is more: that the timed calls trained on every image of the epoch's order once, each in its
step, by the rule of gradient descent, at the step's learning rate. So a few whole steps are
compared with that rule (cnnlib/validation/steps.py), before the clock starts and again from the
weights that the timed training ended with, and the timed calls are replayed
(cnnlib/validation/replay.py).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from cnnlib.datasets import Dataset
from cnnlib.engine import Bytes, Engine, ImageByImage, OwnLoop, Setup, Stage
from cnnlib.system.turns import untimed
from cnnlib.training.loop import accuracy, start
from cnnlib.training.target import Target, open_engine
from cnnlib.validation.parity import compare_logits, validate
from cnnlib.validation.replay import EngineState, Recording, recorded_epochs
from cnnlib.validation.steps import STEPS, check_real_steps, check_steps
from cnnlib.validation.trial import POOL
from cnnlib.validation.verdicts import ValidationFailed

CHECKED_EPOCHS = 2
"""Epochs that `check_training` trains."""
MOMENTUM = 0.9
"""Momentum of the check where the experiment trains without any."""


def check_before(engine: Engine, images: Bytes, labels: Bytes, seed: int) -> float:
    """Check all that can be checked before a clock starts, from the engine's weights.

    Returns the largest error as a share of what is allowed.

    `images` and `labels` are the training set that the engine has loaded; the engine is left
    trained. Raises ValidationFailed or Unjudged.
    """
    state, size = EngineState.of(engine), engine.setup.batch_size
    share = _looked(
        engine, state, lambda look: validate(engine, *_batch(images, labels, size, look))
    )
    if isinstance(engine, OwnLoop):
        compare_logits(engine, images[:size])
    if engine.setup.momentum:  # otherwise check_momentum does the same, with one
        share = max(share, _look_at_steps(engine, state, images, labels, seed))
    _look_at_real_steps(engine, state, images, labels, seed)
    return share


def _batch(images: Bytes, labels: Bytes, size: int, number: int) -> tuple[Bytes, Bytes]:
    """Batch `number` of a training set, or fewer images where it has no more."""
    chosen = np.unique(np.arange(number * size, (number + 1) * size) % len(labels))
    return images[chosen], labels[chosen]


def _looked(engine: Engine, state: EngineState, check: Callable[[int], float]) -> float:
    """What `check` returns for look 0, begun in a state of the engine.

    Where products are coarser than numbers, a single decision of relu or max now and then moves a
    gradient further than it did in any coarse reference. What is wrong is wrong for other images,
    too: a check that such a stage fails is made again, as look 1, and that verdict counts.
    """
    state.put_into(engine)
    try:
        return check(0)
    except ValidationFailed:
        if not engine.stage.rounding:
            raise
    state.put_into(engine)
    return check(1)


def _look_at_steps(
    engine: Engine, state: EngineState, images: Bytes, labels: Bytes, seed: int
) -> float:
    return _looked(engine, state, lambda look: check_steps(engine, images, labels, seed + look))


def _look_at_real_steps(
    engine: Engine, state: EngineState, images: Bytes, labels: Bytes, seed: int
) -> None:
    if isinstance(engine, ImageByImage):
        return
    _looked(engine, state, lambda look: check_real_steps(engine, images, labels, seed + look))


def check_after(
    recording: Recording, images: Bytes, labels: Bytes, seed: int, first: int = 0
) -> None:
    """Check the recorded calls from `first` on, and steps from the weights they ended with.

    This is done once the clock has been read. The engine returns to those weights.

    Raises ValidationFailed or Unjudged.
    """
    engine = recording.engine
    recording.check(first)
    trained = EngineState.of(engine)
    if not np.isfinite(trained.parameters).all():
        return
    if isinstance(engine, OwnLoop):
        compare_logits(engine, images[: engine.setup.batch_size])
    _look_at_steps(engine, trained, images, labels, seed + 1)
    _look_at_real_steps(engine, trained, images, labels, seed + 1)
    recording.restore()


def check_momentum(stage: Stage, setup: Setup, target: Target, dataset: Dataset, seed: int) -> None:
    """Check steps with a momentum, by an engine of their own, where the experiment has none."""
    batch_size = setup.batch_size
    if issubclass(stage.engine, ImageByImage):
        batch_size = min(batch_size, 2)  # images do not meet, and take long
    count = max(STEPS * batch_size, POOL)
    few = dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:count],
        train_labels=dataset.train_labels[:count],
    )
    moving = dataclasses.replace(setup, batch_size=batch_size, momentum=MOMENTUM, labels="")
    with untimed(), open_engine(stage, moving, target, few) as engine:
        start(engine, seed)
        state = EngineState.of(engine)
        _look_at_steps(engine, state, few.train_images, few.train_labels, seed)


def check_training(
    stage: Stage, setup: Setup, target: Target, dataset: Dataset, seed: int
) -> float:
    """All checks of a measurement around CHECKED_EPOCHS epochs that are not timed.

    Returns the largest error of the checks before them as a share of what is allowed. Raises
    ValidationFailed or Unjudged.
    """
    count = len(dataset.train_labels)
    with open_engine(stage, setup, target, dataset) as engine:
        start(engine, seed)
        share = check_before(engine, dataset.train_images, dataset.train_labels, seed)
        start(engine, seed)
        recording = Recording(engine)
        for _ in recorded_epochs(recording, count, CHECKED_EPOCHS, seed):
            accuracy(engine, dataset.test_images, dataset.test_labels)
            recording.unchanged("an evaluation")
        check_after(recording, dataset.train_images, dataset.train_labels, seed)
    if not setup.momentum:
        check_momentum(stage, setup, target, dataset, seed)
    return share
