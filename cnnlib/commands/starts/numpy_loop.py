"""Stage NAME: a training loop of its own, in numpy.

    cnnlib check --stage ./NAME.py     compares it with the reference
    sweep: {stages: [gemm, ./NAME.py]}    in a config measures it and draws it beside others

Each operator returns its target and a function `back`, which makes of the target's error that of
the source and the gradients of the weights. Arrays have the images first: maps (n, c, h, w).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cnnlib.engine import OwnLoop, Stage
from cnnlib.layers import FUNCTIONS, LOSSES, Activation, Array, Conv, Dense, Subsample

Pair = tuple[int, int]
Result = tuple[Array, Callable[[Array], tuple[Array, ...]]]


def windows(maps: Array, size: Pair, strides: Pair) -> Array:
    """A view (n, c, h, w, rows, columns) of all windows; what is added to it goes into `maps`."""
    found: Array = sliding_window_view(maps, size, (2, 3), writeable=True)
    return found[:, :, :: strides[0], :: strides[1]]


def padded(maps: Array, padding: Pair, value: float = 0) -> Array:
    """The maps with `padding` rows and columns of `value` on each side."""
    return np.pad(maps, ((0, 0), (0, 0), *((p, p) for p in padding)), constant_values=value)


def inner(maps: Array, padding: Pair) -> Array:
    """The maps without these rows and columns."""
    (rows, columns), (height, width) = padding, maps.shape[2:]
    return maps[:, :, rows : height - rows, columns : width - columns]


def convolve(layer: Conv, source: Array, weight: Array, bias: Array) -> Result:
    """A convolution as a product of all windows with the weights."""
    wide = padded(source, layer.padding)
    seen = windows(wide, layer.kernel, layer.stride)
    target = np.tensordot(seen, weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)

    def back(error: Array) -> tuple[Array, ...]:
        wide_error = np.zeros_like(wide)
        into = windows(wide_error, layer.kernel, layer.stride)
        for place in np.ndindex(*layer.kernel):
            into[..., *place] += np.einsum("nmhw,mc->nchw", error, weight[..., *place])
        gradient = np.tensordot(error, seen, ((0, 2, 3), (0, 2, 3)))
        return inner(wide_error, layer.padding), gradient, error.sum((0, 2, 3))

    return target + bias[:, None, None], back


def activate(layer: Activation, source: Array) -> Result:
    """An activation function, element by element."""
    function, target = FUNCTIONS[layer.function], np.empty_like(source)
    slope = np.empty(source.shape, function.slope_type or source.dtype)
    function.values(source, target, slope)
    if function.slopes is not None:
        function.slopes(target, slope)
    return target, lambda error: (error * slope,)


def subsample(layer: Subsample, source: Array) -> Result:
    """The maximum or the mean of each window."""
    largest = layer.method == "max"
    wide = padded(source, layer.padding, -np.inf if largest else 0)
    seen = windows(wide, layer.size, layer.strides)
    flat = seen.reshape(*seen.shape[:4], -1)
    first = flat.argmax(-1)[..., None]  # of equal elements the first gets the error
    target = np.take_along_axis(flat, first, -1)[..., 0] if largest else flat.mean(-1)

    def back(error: Array) -> tuple[Array, ...]:
        share = first == np.arange(flat.shape[-1]) if largest else np.float32(1 / flat.shape[-1])
        each = np.broadcast_to(error[..., None] * share, flat.shape).reshape(seen.shape)
        wide_error = np.zeros_like(wide)
        into = windows(wide_error, layer.size, layer.strides)
        for place in np.ndindex(*layer.size):  # windows may overlap
            into[..., *place] += each[..., *place]
        return (inner(wide_error, layer.padding),)

    return target, back


def connect(layer: Dense, source: Array, weight: Array, bias: Array) -> Result:
    """A fully connected layer."""
    flat = source.reshape(len(source), -1)
    return flat @ weight.T + bias, lambda error: (
        (error @ weight).reshape(source.shape),
        error.T @ flat,
        error.sum(0),
    )


class Loop(OwnLoop):
    """Gradient descent with momentum and weight decay."""

    losses = tuple(LOSSES)
    decays = True

    def prepare(self) -> None:
        parameters = self.network.parameters
        self.weights = [np.zeros(p.shape, np.float32) for p in parameters]
        self.velocities = [np.zeros(p.shape, np.float32) for p in parameters]
        self.parts = [
            (each, [i for i, p in enumerate(parameters) if p.layer == each.start])
            for each in self.plan
        ]

    def forward(self, images: Array) -> Array:
        self.backs = []
        for each, own in self.parts:
            images, back = each.operator(each.layers[0], images, *(self.weights[i] for i in own))
            self.backs.append(back)
        return images

    def step(self, images: Array, labels: Array, rate: float) -> Any:
        losses, errors = self.setup.loss_function.many(self.forward(images).T, labels)
        error = errors.T / np.float32(len(labels))
        for (_, own), back in zip(reversed(self.parts), reversed(self.backs), strict=True):
            error, *gradients = back(error)
            for i, gradient in zip(own, gradients, strict=True):
                self.velocities[i] *= self.setup.momentum
                self.velocities[i] += gradient + self.setup.weight_decay * self.weights[i]
        for weight, velocity in zip(self.weights, self.velocities, strict=True):
            weight -= np.float32(rate) * velocity
        return losses.mean()


STAGE = Stage(
    name="NAME",
    title="NAME",
    change="a training loop of its own, in numpy",
    runs_on="cpu",
    engine=Loop,
    operators={
        (Conv,): convolve,
        (Activation,): activate,
        (Subsample,): subsample,
        (Dense,): connect,
    },
)
