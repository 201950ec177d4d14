"""Networks that tests train: a function each, so that a name in a failure says which."""

from cnnlib.layers import Layer
from cnnlib.network import Network, parse_layers


def build(name: str, input_shape: tuple[int, ...], classes: int, layers: list[object]) -> Network:
    parsed: tuple[Layer, ...] = parse_layers(name, layers)
    return Network(name, input_shape, classes, parsed)


def lenet5(method: str = "max", function: str = "relu") -> Network:
    """LeNet-5 on 28x28."""
    return build(
        f"lenet5_{method}_{function}",
        (1, 28, 28),
        10,
        [
            {"conv": {"maps": 6, "kernel": 5}},
            {"activation": function},
            {"subsample": {"size": 2, "method": method}},
            {"conv": {"maps": 16, "kernel": 5}},
            {"activation": function},
            {"subsample": {"size": 2, "method": method}},
            {"dense": 120},
            {"activation": function},
            {"dense": 84},
            {"activation": function},
            {"dense": 10},
        ],
    )


def simard() -> Network:
    """Simard et al. 2003: strides instead of subsampling."""
    return build(
        "simard",
        (1, 28, 28),
        10,
        [
            {"conv": {"maps": 5, "kernel": 5, "stride": 2}},
            {"activation": "relu"},
            {"conv": {"maps": 50, "kernel": 5, "stride": 2}},
            {"activation": "relu"},
            {"dense": 100},
            {"activation": "relu"},
            {"dense": 10},
        ],
    )


def awkward() -> Network:
    """Odd sizes everywhere: nothing is a multiple of anything."""
    return build(
        "awkward",
        (3, 17, 13),
        5,
        [
            {"conv": {"maps": 7, "kernel": 4}},
            {"activation": "sigmoid"},
            {"subsample": {"size": 2, "method": "max"}},
            {"conv": {"maps": 3, "kernel": 3}},
            {"activation": "tanh"},
            {"dense": 11},
            {"activation": "relu"},
            {"dense": 5},
        ],
    )
