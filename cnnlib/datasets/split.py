"""Draws the images that are left out of training and watched instead."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def held_out(labels: NDArray[np.uint8], count: int, seed: int) -> Mask:
    """Mask (N,) of `count` images, of each class as many as its share, drawn by `seed`.

    Shares are rounded so that they add up to `count`: those with the largest remainders are
    rounded up, and of equal ones the classes with the lowest labels. The same labels and seed give
    the same mask on every machine.
    """
    generator = np.random.default_rng(seed)
    sizes = np.bincount(labels)
    shares = sizes * count
    counts = shares // len(labels)
    remainders = shares % len(labels)
    for label in np.argsort(-remainders, kind="stable")[: count - int(counts.sum())]:
        counts[label] += 1
    mask = np.zeros(len(labels), bool)
    for label, wanted in enumerate(counts):
        mask[generator.permutation(np.flatnonzero(labels == label))[:wanted]] = True
    return mask
