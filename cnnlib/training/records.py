"""What a trainer returns about an epoch, its course and an evaluation."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """How well a network recognises images with known labels."""

    accuracy: float
    """Share of images whose most probable class is the label; nan if a logit is not finite."""
    loss: float
    """Mean of the loss that the network is trained by; nan if a logit is not finite."""
    images: int
    """Number of images."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a training."""

    epoch: int
    """Its number, counted from 1 since the trainer was made."""
    loss: float
    """Mean loss of its steps, each before the step's update."""
    seconds: float
    """From before the order of images was drawn until the last update was done. Compiling, loading
    the images, validation and callbacks are not part of it.
    """
    images: int
    """Images trained on: those of whole batches; the rest of an epoch's order is left out."""
    validation: Evaluation | None = None
    """On `validation_data`, if that was given."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else math.inf

    @property
    def validation_accuracy(self) -> float | None:
        return None if self.validation is None else self.validation.accuracy

    @property
    def validation_loss(self) -> float | None:
        return None if self.validation is None else self.validation.loss


@dataclass(frozen=True)
class Progress:
    """The position of a training within an epoch, for a callback."""

    epoch: int
    """Number of the epoch, as in EpochRecord."""
    last_epoch: int
    """Number of the last epoch of this `fit`."""
    step: int
    """Steps of the epoch that are done."""
    steps: int
    """Steps of an epoch."""
    loss: float
    """Mean loss of these steps; nan before the first has ended."""
    seconds: float
    """Time spent on them."""
