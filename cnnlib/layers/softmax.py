"""The loss every network ends in: softmax and cross-entropy against the true class."""

import numpy as np

from cnnlib.layers.base import Array


def softmax(logits: Array) -> Array:
    """Class probabilities exp(logits) / sum of exp(logits) along the last axis, same dtype.

    The largest logit is taken off first, which changes nothing but keeps exp within range.
    """
    powers: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total: Array = powers.sum(axis=-1, keepdims=True)
    return powers / total


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
