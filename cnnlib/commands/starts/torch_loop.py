"""Stage NAME: a training loop of its own, in PyTorch.

    cnnlib check --stage ./NAME.py     compares it with the reference
    sweep: {stages: [torch, ./NAME.py]}   in a config measures it and draws it beside others

Where PyTorch is not installed, its runs are `unavailable` and say so.
"""

import math
from typing import Any

import torch
from torch import nn

from cnnlib.engine import OwnLoop, Planned, Stage
from cnnlib.errors import Unsupported
from cnnlib.layers import Activation, Array, Conv, Dense, Subsample


def convolution(planned: Planned) -> nn.Module:
    """A convolution from the maps below to its own."""
    layer, channels = planned.layer(Conv), planned.source_shape[0]
    return nn.Conv2d(channels, layer.maps, layer.kernel, layer.stride, layer.padding)


def activation(planned: Planned) -> nn.Module:
    """An activation function; others than these are refused by name."""
    name = planned.layer(Activation).function
    if name not in ("relu", "tanh"):
        raise Unsupported(f"stage 'NAME' has no activation function {name}")
    return nn.ReLU() if name == "relu" else nn.Tanh()


def subsampling(planned: Planned) -> nn.Module:
    """The maximum or the mean of each window."""
    layer = planned.layer(Subsample)
    kind = nn.MaxPool2d if layer.method == "max" else nn.AvgPool2d
    return kind(layer.size, layer.strides, layer.padding)


def connection(planned: Planned) -> nn.Module:
    """A fully connected layer of vectors, or of maps in a row."""
    inputs = math.prod(planned.source_shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, planned.layer(Dense).units))


class Loop(OwnLoop):
    """torch.optim.SGD, a call for every operation; no loss but cross-entropy."""

    decays = True

    def prepare(self) -> None:
        self.where = torch.device("cuda" if self.setup.device_kind == "cuda" else "cpu")
        modules = [planned.operator(planned) for planned in self.plan]
        self.model = nn.Sequential(*modules, nn.Flatten()).to(self.where)
        self.weights = list(self.model.parameters())
        momentum, decay = self.setup.momentum, self.setup.weight_decay
        self.optimizer = torch.optim.SGD(self.weights, 0.1, momentum, weight_decay=decay)
        if momentum:  # from rest, where PyTorch would begin with the first gradient
            self.velocities = [torch.zeros_like(weight) for weight in self.weights]
            for weight, velocity in zip(self.weights, self.velocities, strict=True):
                self.optimizer.state[weight]["momentum_buffer"] = velocity

    def place(self, array: Array) -> Any:
        return torch.as_tensor(array, device=self.where)

    def step(self, images: Any, labels: Any, rate: float) -> Any:
        self.optimizer.param_groups[0]["lr"] = rate
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def forward(self, images: Any) -> Any:
        with torch.no_grad():
            return self.model(images)


STAGE = Stage(
    name="NAME",
    title="NAME",
    change="a training loop of its own, in PyTorch",
    runs_on="any",
    engine=Loop,
    operators={
        (Conv,): convolution,
        (Activation,): activation,
        (Subsample,): subsampling,
        (Dense,): connection,
    },
    repeatable=False,  # PyTorch sums some gradients in no fixed order on a GPU
    slack=8,  # and it chooses among algorithms that sum larger numbers
    conv_weight_slack=64,
)
