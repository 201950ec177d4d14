"""What only an engine that takes one image at a time offers: a training that can stop anywhere.

A step of thousands of images takes such an engine minutes, which an interrupted training must not
lose, and which a measurement can scale up from a part of the batch.
"""

from abc import ABC, abstractmethod

import numpy as np

from cnnlib.engine.base import Engine
from cnnlib.engine.stage import Order
from cnnlib.layers import Array


class ImageByImage(ABC):
    """A mixin for engines whose time per image is the same at every batch size."""

    @abstractmethod
    def train_images(self, order: Order, rates: Array | None = None) -> float:
        """Train on the images of `order`, which may begin and end within a step.

        `rates` are the learning rates of the steps that end in it, the setup's constant one if not
        given. Returns the sum of the mean losses of these steps.
        """

    @property
    @abstractmethod
    def unfinished(self) -> Array:
        """A vector with everything that the images so far have left of the step not yet ended."""

    @unfinished.setter
    @abstractmethod
    def unfinished(self, vector: Array) -> None:
        """Continue with a vector read before; ValueError if it is of another network."""

    @abstractmethod
    def time_update(self) -> float:
        """Seconds of one update alone; the parameters may change."""


def unit_of(engine: Engine) -> int:
    """Images that are trained on together: a training can be interrupted between two units."""
    return 1 if isinstance(engine, ImageByImage) else engine.setup.batch_size


def train_units(engine: Engine, order: Order, rates: Array | None = None) -> float:
    """Train on whole units; the sum of the mean losses of the steps that ended in it.

    `rates` are the learning rates of these steps; the setup's constant one if not given.
    """
    size = engine.setup.batch_size
    if isinstance(engine, ImageByImage):
        return engine.train_images(order, rates)
    return engine.train(order, rates) * (len(order) // size)


def unfinished_of(engine: Engine) -> Array:
    """What units have left of a step that has not ended; nothing where a unit is a step."""
    if isinstance(engine, ImageByImage):
        return engine.unfinished
    return np.zeros(0, engine.stage.dtype)


def continue_step(engine: Engine, unfinished: Array) -> None:
    """Put what `unfinished_of` gave back; ValueError if it is of another engine or network."""
    if isinstance(engine, ImageByImage):
        engine.unfinished = unfinished
    elif len(unfinished):
        raise ValueError("steps of this engine are done whole")
