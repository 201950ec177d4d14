"""Stage cupy_loop: convolutions, tanh, relu and dense layers in CuPy, every derivative by hand.

python -m cnnlib judge examples/stages/cupy_loop.py --network simard
"""

import cupy

from cnnlib.engine import OwnLoop, Stage
from cnnlib.errors import Unsupported
from cnnlib.layers import Activation, Conv, Dense


def convolve(part, source, weight, bias):
    """A convolution: the target, and what goes back."""
    layer, (maps, rows, columns) = part.layer(Conv), part.target_shape
    (high, wide), (down, across) = layer.kernel, layer.stride
    places = [  # what each element of the kernel sees, over all positions at once
        (r, c, cupy.s_[:, :, r : r + rows * down : down, c : c + columns * across : across])
        for r in range(high)
        for c in range(wide)
    ]
    seen = cupy.stack([source[place] for *_, place in places], axis=2)
    target = cupy.tensordot(seen, weight.reshape(maps, -1, high * wide), ((1, 2), (1, 2)))

    def back(error):
        source_error = cupy.zeros_like(source)
        for r, c, place in places:
            share = cupy.tensordot(error, weight[:, :, r, c], (1, 0))
            source_error[place] += share.transpose(0, 3, 1, 2)
        gradient = cupy.tensordot(error, seen, ((0, 2, 3), (0, 3, 4)))
        return source_error, gradient.reshape(weight.shape), error.sum((0, 2, 3))

    return target.transpose(0, 3, 1, 2) + bias[:, None, None], back


def activate(part, source):
    """An activation function."""
    if part.layer(Activation).function == "relu":
        return cupy.maximum(source, 0), lambda error: (error * (source > 0),)
    target = cupy.tanh(source)
    return target, lambda error: (error * (1 - target * target),)


def connect(part, source, weight, bias):
    """A fully connected layer."""
    flat = source.reshape(len(source), -1)
    return flat @ weight.T + bias, lambda error: (
        (error @ weight).reshape(source.shape),
        error.T @ flat,
        error.sum(0),
    )


def other_function(layers, source_shape):
    """Why an activation function is not served; "" if it is."""
    return "" if layers[0].function in ("relu", "tanh") else "it has relu and tanh alone"


def padding(layers, source_shape):
    """Why a convolution is not served; "" if it is."""
    return "it has no padding" if any(layers[0].padding) else ""


activate.declines, convolve.declines = other_function, padding


class Loop(OwnLoop):
    """Plain gradient descent with momentum, on a GPU."""

    def prepare(self):
        if self.setup.device_kind != "cuda":
            raise Unsupported(f"stage '{self.stage.name}' needs a GPU")
        self.weights = [cupy.zeros(p.shape, "f4") for p in self.network.parameters]
        self.velocities = [cupy.zeros_like(weight) for weight in self.weights]

    def place(self, array):
        return cupy.asarray(array)

    def forward(self, maps):
        self.backs, weights = [], iter(self.weights)
        for part in self.plan:
            own = part.layers[0].parameter_shapes(part.source_shape)
            maps, back = part.operator(part, maps, *(next(weights) for _ in own))
            self.backs.append(back)
        return maps

    def step(self, images, labels, rate):
        logits, each = self.forward(images), cupy.arange(len(images))
        odds = cupy.exp(logits - logits.max(1, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        loss, gradients = -cupy.log(odds[each, labels]).mean(), []
        odds[each, labels] -= 1
        error = odds / len(images)
        for back in reversed(self.backs):
            error, *own = back(error)
            gradients = own + gradients
        for weight, velocity, gradient in zip(
            self.weights, self.velocities, gradients, strict=True
        ):
            velocity *= self.setup.momentum
            velocity += gradient
            weight -= rate * velocity
        return loss


STAGE = Stage(
    name="cupy_loop",
    title="CuPy loop",
    change="a training loop in CuPy, with derivatives by hand",
    runs_on="any",
    engine=Loop,
    operators={(Conv,): convolve, (Activation,): activate, (Dense,): connect},
    repeatable=False,  # cuBLAS may split sums in another way from call to call
    slack=8,
)
