"""The loss every network ends in: softmax and cross-entropy against the true class."""

import numpy as np

from cnnlib.layers.base import Array


def softmax(logits: Array) -> Array:
    """Class probabilities exp(logits) / sum of exp(logits) along the last axis, same dtype."""
    _, powers, sums = _exponentials(logits, axis=-1)
    return powers / sums


def cross_entropy(logits: Array, label: int) -> tuple[float, Array]:
    """(loss, error) of one image: -log softmax(logits)[label] and its derivative by the logits.

    logits (classes,). The logarithm is taken of the sum, not of a probability that may have
    rounded to zero: the loss is finite for all finite logits.
    """
    largest = logits.max()
    loss = np.log(np.exp(logits - largest).sum()) + largest - logits[label]
    error = softmax(logits)
    error[label] -= 1
    return float(loss), error


def cross_entropies(logits: Array, labels: Array) -> tuple[Array, Array]:
    """(losses (n,), error (classes, n)): `cross_entropy` of every column of logits (classes, n)."""
    shifted, powers, sums = _exponentials(logits, axis=0)
    images = np.arange(len(labels))
    losses = np.log(sums[0]) - shifted[labels, images]
    error = powers / sums
    error[labels, images] -= 1
    return losses, error


def _exponentials(logits: Array, axis: int) -> tuple[Array, Array, Array]:
    """(logits less their largest, exp of these, sums of exp), the axis kept with length 1 in sums.

    Taking the largest off changes no probability but keeps exp within range.
    """
    shifted: Array = logits - logits.max(axis=axis, keepdims=True)
    powers: Array = np.exp(shifted)
    sums: Array = powers.sum(axis=axis, keepdims=True)
    return shifted, powers, sums
