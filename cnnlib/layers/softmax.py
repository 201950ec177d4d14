"""From logits to probabilities of the classes."""

import numpy as np

from cnnlib.layers.base import Array


def softmax(logits: Array) -> Array:
    """Class probabilities exp(logits) / sum of exp(logits) along the last axis, same dtype."""
    _, powers, sums = exponentials(logits, axis=-1)
    return powers / sums


def exponentials(logits: Array, axis: int) -> tuple[Array, Array, Array]:
    """(logits less their largest, exp of these, sums of exp), the axis kept with length 1 in sums.

    Taking the largest off changes no probability but keeps exp within range.
    """
    shifted: Array = logits - logits.max(axis=axis, keepdims=True)
    powers: Array = np.exp(shifted)
    sums: Array = powers.sum(axis=axis, keepdims=True)
    return shifted, powers, sums
