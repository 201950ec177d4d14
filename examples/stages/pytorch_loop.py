"""Stage pytorch_loop: a training loop in PyTorch as one would write it, on a GPU or a CPU.

python -m cnnlib judge examples/stages/pytorch_loop.py
"""

import torch
from torch.nn import functional

from cnnlib.engine import OwnLoop, Stage
from cnnlib.layers import Activation, Conv, Dense, Subsample

FUNCTIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def convolve(layer, maps, weight, bias):
    """A convolution."""
    return functional.conv2d(maps, weight, bias, layer.stride, layer.padding)


def activate(layer, maps):
    """An activation function."""
    return FUNCTIONS[layer.function](maps)


def subsample(layer, maps):
    """The maximum or the mean of each window."""
    pool = functional.max_pool2d if layer.method == "max" else functional.avg_pool2d
    return pool(maps, layer.size, layer.strides, layer.padding)


def connect(layer, maps, weight, bias):
    """A fully connected layer."""
    return functional.linear(maps.flatten(1), weight, bias)


class Loop(OwnLoop):
    """Plain gradient descent with momentum; autograd computes the gradient."""

    def prepare(self):
        self.where = torch.device(self.setup.device_kind)
        zeros = [torch.zeros(p.shape, device=self.where) for p in self.network.parameters]
        self.weights = [weight.requires_grad_() for weight in zeros]
        self.velocities = [torch.zeros_like(weight) for weight in zeros]

    def place(self, array):
        return torch.as_tensor(array, device=self.where)

    def forward(self, maps):
        weights = iter(self.weights)
        for part in self.plan:
            own = part.layers[0].parameter_shapes(part.source_shape)
            maps = part.operator(part.layers[0], maps, *(next(weights) for _ in own))
        return maps.flatten(1)

    def step(self, images, labels, rate):
        loss = functional.cross_entropy(self.forward(images), labels)
        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            torch._foreach_mul_(self.velocities, self.setup.momentum)
            torch._foreach_add_(self.velocities, gradients)
            torch._foreach_add_(self.weights, self.velocities, alpha=-rate)
        return loss.detach()


def unknown_function(layers, source_shape):
    """Why an activation function is not served; "" if it is."""
    name = layers[0].function
    return "" if name in FUNCTIONS else f"it has no activation function {name}"


activate.declines = unknown_function

STAGE = Stage(
    name="pytorch_loop",
    title="PyTorch loop",
    change="a training loop in PyTorch, written by hand",
    runs_on="any",
    engine=Loop,
    operators={
        (Conv,): convolve,
        (Activation,): activate,
        (Subsample,): subsample,
        (Dense,): connect,
    },
    repeatable=False,  # cuDNN sums some gradients in no fixed order
    slack=8,
    conv_weight_slack=64,
)
