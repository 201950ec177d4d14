"""What a training makes small: the loss of one image, from its logits and its true class."""

from abc import ABC, abstractmethod

import numpy as np

from cnnlib.errors import ConfigError
from cnnlib.layers.base import Array
from cnnlib.layers.softmax import exponentials, softmax


class Loss(ABC):
    """A loss, for one image as the reference computes it and for many at once."""

    formula: str
    """What documents write for it."""

    @abstractmethod
    def one(self, logits: Array, label: int) -> tuple[float, Array]:
        """(loss, error) of one image: the loss and its derivative by the logits (classes,)."""

    @abstractmethod
    def many(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """(losses (n,), error (classes, n)): `one` of every column of logits (classes, n)."""


class CrossEntropy(Loss):
    """-log softmax(logits)[label].

    The logarithm is taken of the sum, not of a probability that may have rounded to zero: the loss
    is finite for all finite logits.
    """

    formula = "-log softmax(logits)[label]"

    def one(self, logits: Array, label: int) -> tuple[float, Array]:
        largest = logits.max()
        loss = np.log(np.exp(logits - largest).sum()) + largest - logits[label]
        error = softmax(logits)
        error[label] -= 1
        return float(loss), error

    def many(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        shifted, powers, sums = exponentials(logits, axis=0)
        images = np.arange(len(labels))
        losses = np.log(sums[0]) - shifted[labels, images]
        error = powers / sums
        error[labels, images] -= 1
        return losses, error


class MeanSquaredError(Loss):
    """The mean over the classes of (logit - t)^2, t being 1 for the true class and 0 for others.

    It is torch.nn.MSELoss between the logits and the one-hot vector of the class.
    """

    formula = "mean over the classes of (logit - t)^2, t = 1 for the true class and 0 for others"

    def one(self, logits: Array, label: int) -> tuple[float, Array]:
        difference = logits.copy()
        difference[label] -= 1
        loss = np.sum(difference * difference) / len(logits)
        return float(loss), difference * (2 / len(logits))

    def many(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        difference = logits.copy()
        difference[labels, np.arange(len(labels))] -= 1
        losses = np.square(difference).sum(axis=0) / len(logits)
        return losses, difference * logits.dtype.type(2 / len(logits))


LOSSES: dict[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "mean_squared_error": MeanSquaredError(),
}
"""Name in config.yaml -> loss.

:meta hide-value:
"""
DEFAULT_LOSS = "cross_entropy"


def find_loss(name: str) -> Loss:
    """The loss of this name; ConfigError naming the choices if there is none."""
    if name not in LOSSES:
        raise ConfigError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
    return LOSSES[name]
