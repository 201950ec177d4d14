"""Dropout (Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
JMLR 2014), with masks that every stage computes alike.
"""

import math

import numpy as np
from pydantic import Field

from cnnlib.arithmetic import ceil_div
from cnnlib.layers.base import Array, Layer, Shape, Views, like
from cnnlib.layers.philox import philox

MASK = "mask"
"""The key under which a layer finds its mask beside its parameters, in training only."""
CHUNK = 2**13
"""Counters whose random words are drawn together: so many that they stay in a core's cache."""


class Dropout(Layer):
    """target = source * mask in training, and target = source at any other time.

    An element of the mask is 0 with probability `rate` and otherwise 1 / (1 - rate), so that the
    mean of the target is the source's. `mask` says how it is drawn.
    """

    kind = "dropout"
    shorthand = "rate"

    rate: float = Field(ge=0, lt=1, allow_inf_nan=False)
    """The probability with which an element becomes 0."""

    @property
    def threshold(self) -> int:
        """The least random word, of 32 bits, that keeps an element."""
        return min(round(self.rate * 2**32), 2**32 - 1)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied with."""
        return 1 / (1 - self.rate)

    def mask(self, shape: Shape, seed: int, step: int, layer: int, image: int | Array) -> Array:
        """Which elements of a map of `shape` are kept: (*shape,), or (n, *shape) for n images.

        A pure function of the training's `seed`, the number of steps done before this one, the
        layer's index in the network, the image's position in its batch and the element's position
        in C order, u. The random word is word u % 4 of Philox's output for the counter
        (u // 4, image, step, layer) and the key (seed mod 2^32, seed div 2^32).
        """
        size = math.prod(shape)
        images = np.atleast_1d(np.asarray(image))
        key = seed % 2**32, (seed >> 32) % 2**32
        blocks = np.arange(ceil_div(size, 4))[:, None]
        kept = np.empty((len(blocks), 4, len(images)), bool)
        chunk = ceil_div(CHUNK, len(images))
        for start in range(0, len(blocks), chunk):
            part = slice(start, start + chunk)
            words = philox((blocks[part], images, step % 2**32, layer), key)
            np.greater_equal(words.swapaxes(0, 1), self.threshold, out=kept[part])
        found = kept.reshape(-1, len(images))[:size].T.reshape(-1, *shape)
        return found if np.ndim(image) else found[0]

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def forward(self, parameters: Views, source: Array) -> Array:
        return self._masked(parameters, source)

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        return self._masked(parameters, target_error), {}

    def _masked(self, parameters: Views, values: Array) -> Array:
        if MASK not in parameters:
            return values.copy()
        mask = parameters[MASK]
        masked = like(values, values.shape)
        for position in range(values.size):
            if mask.flat[position]:
                masked.flat[position] = values.flat[position] * self.scale
        return masked
