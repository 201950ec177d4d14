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
from cnnlib.errors import Unsupported
from cnnlib.layers import Activation, Array, Conv, Dense, Subsample

Result = tuple[Array, Callable[[Array], tuple[Array, ...]]]


def windows(maps: Array, size: Any, stride: Any) -> Array:
    """A view (n, c, h, w, rows, columns) of all windows; what is added to it goes into `maps`."""
    found: Array = sliding_window_view(maps, np.broadcast_to(size, 2), (2, 3), writeable=True)
    rows, columns = np.broadcast_to(stride, 2)
    return found[:, :, ::rows, ::columns]


def convolve(layer: Conv, source: Array, weight: Array, bias: Array) -> Result:
    """A convolution as a product of all windows with the weights."""
    seen = windows(source, layer.kernel, layer.stride)
    target = np.tensordot(seen, weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)

    def back(error: Array) -> tuple[Array, ...]:
        source_error = np.zeros_like(source)
        into = windows(source_error, layer.kernel, layer.stride)
        for place in np.ndindex(*weight.shape[2:]):
            into[..., *place] += np.einsum("nmhw,mc->nchw", error, weight[..., *place])
        gradient = np.tensordot(error, seen, ((0, 2, 3), (0, 2, 3)))
        return source_error, gradient, error.sum((0, 2, 3))

    return target + bias[:, None, None], back


def activate(layer: Activation, source: Array) -> Result:
    """An activation function; others than relu are refused by name."""
    if layer.function != "relu":
        raise Unsupported(f"stage 'NAME' has no activation function {layer.function}")
    return np.maximum(source, 0), lambda error: (error * (source > 0),)


def subsample(layer: Subsample, source: Array) -> Result:
    """The maximum or the mean of each window of `layer.size`, without overlap."""
    seen = windows(source, layer.size, layer.size)
    flat = seen.reshape(*seen.shape[:4], -1)
    if layer.method == "max":  # the first of equal elements gets the error
        share = flat.argmax(-1)[..., None] == np.arange(flat.shape[-1])
    else:
        share = np.full(flat.shape, 1 / flat.shape[-1], source.dtype)

    def back(error: Array) -> tuple[Array, ...]:
        source_error = np.zeros_like(source)
        into = windows(source_error, layer.size, layer.size)
        into += (share * error[..., None]).reshape(seen.shape)
        return (source_error,)

    return (flat * share).sum(-1), back


def connect(layer: Dense, source: Array, weight: Array, bias: Array) -> Result:
    """A fully connected layer."""
    flat = source.reshape(len(source), -1)
    return flat @ weight.T + bias, lambda error: (
        (error @ weight).reshape(source.shape),
        error.T @ flat,
        error.sum(0),
    )


class Loop(OwnLoop):
    """Plain gradient descent with momentum."""

    def prepare(self) -> None:
        parameters = self.network.parameters
        self.weights = [np.zeros(p.shape, np.float32) for p in parameters]
        self.velocities = [np.zeros(p.shape, np.float32) for p in parameters]
        self.parts = [
            (each, [i for i, p in enumerate(parameters) if p.layer == each.start])
            for each in self.plan
        ]
        self.forward(np.zeros((1, *self.network.input_shape), np.float32))  # refuses what it cannot

    def forward(self, images: Array) -> Array:
        self.backs = []
        for each, own in self.parts:
            images, back = each.operator(each.layers[0], images, *(self.weights[i] for i in own))
            self.backs.append(back)
        return images

    def step(self, images: Array, labels: Array, rate: float) -> Any:
        logits = self.forward(images)
        logits = logits - logits.max(1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        rows = np.arange(len(labels))
        error = np.exp(logs)
        error[rows, labels] -= 1
        error /= len(labels)
        for (_, own), back in zip(reversed(self.parts), reversed(self.backs), strict=True):
            error, *gradients = back(error)
            for i, gradient in zip(own, gradients, strict=True):
                self.velocities[i] *= self.setup.momentum
                self.velocities[i] += gradient
        for weight, velocity in zip(self.weights, self.velocities, strict=True):
            weight -= np.float32(rate) * velocity
        return -logs[rows, labels].mean()


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
