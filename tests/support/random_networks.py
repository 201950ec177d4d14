"""Small networks of random layers, with random weights, for tests of properties."""

import math

import numpy as np
from hypothesis import strategies as st

from cnnlib.exchange.weights import Weights
from cnnlib.layers import Activation, Conv, Dense, Dropout, Layer, Shape, Subsample
from cnnlib.network import Network

EXCHANGED = ("relu", "leaky_relu", "tanh", "scaled_tanh", "sigmoid", "gelu")
"""Activation functions of the library; a user's own need not be those of other programs."""
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
FLOATS = st.floats(-200, 300, width=32)
RATES = st.sampled_from([0.1, 0.25, 0.5])


@st.composite
def layers(draw: st.DrawFn, shape: Shape) -> list[Layer]:
    """Up to five layers for maps of `shape`, then up to two fully connected ones with others."""
    found: list[Layer] = []
    for kind in draw(st.lists(st.sampled_from(["conv", "subsample", "one by one"]), max_size=5)):
        layer = draw(one_by_one())
        if kind == "conv":
            layer = Conv(
                maps=draw(st.integers(1, 4)),
                kernel=draw(PAIRS),
                stride=draw(PAIRS),
                padding=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
            )
        elif kind == "subsample":
            size = draw(PAIRS)
            stride = draw(st.none() | PAIRS)
            layer = Subsample(
                size=size,
                stride=None if stride == size else stride,
                padding=draw(st.tuples(st.integers(0, size[0] // 2), st.integers(0, size[1] // 2))),
                method=draw(st.sampled_from(["max", "mean"])),
            )
        try:
            shape = layer.output_shape(shape)
        except ValueError:  # the map has become too small
            continue
        found.append(layer)
    for _ in range(draw(st.integers(0, 2))):
        found += [Dense(units=draw(st.integers(1, 6))), draw(one_by_one())]
    return found


def one_by_one() -> st.SearchStrategy[Layer]:
    """Layers whose target has the shape of the source."""
    functions = st.sampled_from(EXCHANGED).map(lambda name: Activation(function=name))
    return functions | RATES.map(lambda rate: Dropout(rate=rate))


@st.composite
def weights(draw: st.DrawFn) -> Weights:
    """Weights of a random network, normalised for all channels alike or for each its own."""
    channels = draw(st.integers(1, 3))
    shape = (channels, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    chosen = draw(layers(shape))
    classes = 4
    if draw(st.booleans()) or not any(isinstance(layer, Dense) for layer in chosen):
        chosen = [*chosen, Dense(units=classes)]
    else:
        target = shape
        for layer in chosen:
            target = layer.output_shape(target)
        classes = math.prod(target)
    network = Network("random", shape, classes, tuple(chosen))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    mean, deviation = draw(FLOATS), draw(st.floats(1, 200, width=32))
    each = channels > 1 and draw(st.booleans())
    return Weights(
        network,
        random.normal(0, 0.5, network.parameter_count).astype(np.float32),
        (mean,) * (channels - 1) + (mean + 1,) if each else mean,
        (deviation,) * (channels - 1) + (deviation + 1,) if each else deviation,
        {"seed": 1},
        tuple(f"class {label}" for label in range(classes)) if draw(st.booleans()) else (),
        draw(st.integers(0, 1 << 40)),
    )


def pictures(given: Weights, count: int = 7) -> np.ndarray:
    """Random bytes that the network can take."""
    random = np.random.default_rng(5)
    return random.integers(0, 256, (count, *given.network.input_shape), dtype=np.uint8)
