"""Bounds for a right stage's gradient. Those for whole steps are in cnnlib/validation/steps.py.

Two exact computations of a float32 gradient differ by rounding. Rounding errors of a sum of n terms
grow like sqrt(n) (Higham, Accuracy and Stability of Numerical Algorithms, section 2.8), hence

    bound = FACTOR * eps * sqrt(n * max(1, l / USUAL_LAYERS)) * largest element,

where n is the length of the network's longest sum and l the number of its layers with weights, as
the errors of one layer after another add up in the same way.
"""

import math

import numpy as np

from cnnlib.engine import Engine, Stage
from cnnlib.layers import Conv
from cnnlib.network import Network, Parameter

FACTOR = 4.0
"""Rounding errors seen reach a sixth of the bound; wrong indices are far beyond it."""
USUAL_LAYERS = 5
"""Layers with weights in LeNet-5; the bound is wider for networks that have more."""
COARSE = 64.0
"""Roundings by which the gradient of a stage of less precision may be off, as a whole."""
COARSE_STEPS = 16.0
"""The same for weights after a few steps, beyond what a coarse reference is off by."""
SPREAD = 3.0
"""How many times as far as a coarse reference a stage of less precision may be off: honest TF32 on
six shipped networks, rounded or cut, reached half of it. See cnnlib/validation/coarse.py."""
MOST_AMBIGUITY = 0.5
"""Share of a gradient's largest element that near-ties may leave open. This is a judgement, not a
bound derived from anything. Beyond it a stage is not vouched for."""


def longest_sum(network: Network, batch_size: int) -> int:
    """Terms of the longest sum that training on a batch adds up, forward or backward."""
    longest = 1
    for layer, source, target in zip(
        network.layers, network.shapes, network.shapes[1:], strict=False
    ):
        if not layer.parameter_shapes(source):
            continue
        positions = math.prod(target[1:])  # that share a weight
        seen_by = target[0] * (math.prod(layer.kernel) if isinstance(layer, Conv) else 1)
        longest = max(longest, layer.fan_in(source), positions * batch_size, seen_by)
    return longest


def gradient_bound(engine: Engine, count: int) -> float:
    """The bound for a gradient of `count` images, as a share of its largest element."""
    network = engine.network
    terms = longest_sum(network, count) * max(1.0, weighted_layers(network) / USUAL_LAYERS)
    return FACTOR * engine.stage.slack * machine_epsilon(engine.stage) * math.sqrt(terms)


def weighted_layers(network: Network) -> int:
    """The number of layers that have weights."""
    return len({p.layer for p in network.parameters})


def machine_epsilon(stage: Stage) -> float:
    """The gap between 1 and the next larger number of the stage's dtype."""
    return float(np.finfo(np.dtype(stage.dtype)).eps)


def is_conv_weight(engine: Engine, parameter: Parameter) -> bool:
    """Whether a parameter is the weight of a convolution, which stages may round more coarsely."""
    return isinstance(engine.network.layers[parameter.layer], Conv) and parameter.key == "weight"


def further_slack(engine: Engine, parameter: Parameter) -> float:
    """How many times the stage's usual slack a parameter's gradient is allowed."""
    stage = engine.stage
    if stage.conv_weight_slack and is_conv_weight(engine, parameter):
        return stage.conv_weight_slack / stage.slack
    return 1.0
