"""Networks that tests train, each built by a function of its name."""

from cnnlib.config import load_config
from cnnlib.layers import FUNCTIONS, Layer
from cnnlib.network import Network, parse_layers
from cnnlib.paths import ROOT


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


def shipped(name: str) -> Network:
    """A network of config.yaml, for images of the shape that it is made for, or for digits."""
    spec = load_config([ROOT / "config.yaml"]).networks[name]
    return build(name, tuple(spec.input_shape or (1, 28, 28)), 10, spec.layers)


def small() -> Network:
    """One dense layer over sixteen pixels, where only the engine matters."""
    return build("small", (1, 4, 4), 3, [{"dense": 3}])


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


def deep(convolutions: int, maps: int, method: str | None = None) -> Network:
    """Convolutions with relu on 28x28, and `method` behind the second one and in the middle.

    Kernels are 3x3 for as long as the maps are large enough for another one.
    """
    layers: list[object] = []
    side = 28
    for number in range(1, convolutions + 1):
        kernel = 3 if side >= 6 else 1
        layers += [{"conv": {"maps": maps, "kernel": kernel}}, {"activation": "relu"}]
        side -= kernel - 1
        if method and number in (2, convolutions // 2) and side % 2 == 0 and side > 4:
            layers.append({"subsample": {"size": 2, "method": method}})
            side //= 2
    name = f"deep{convolutions}x{maps}{method or ''}"
    return build(name, (1, 28, 28), 10, [*layers, {"dense": 10}])


*_MOST, _LAST = map(repr, FUNCTIONS)
ANY_FUNCTION = f"{', '.join(_MOST)} or {_LAST}"
"""The names of the activation functions, as a message lists them."""

NETWORKS = {
    network.name: network for network in (lenet5(), lenet5("mean", "tanh"), simard(), awkward())
}
"""Every stage is compared with the reference on these; a network added here meets every check."""


def strides() -> Network:
    """Strides beyond the kernel: rows and columns between two windows belong to neither."""
    return build(
        "strides",
        (3, 37, 41),
        4,
        [
            {"conv": {"maps": 5, "kernel": 3, "stride": 2}},
            {"conv": {"maps": 7, "kernel": 2, "stride": 3}},
            {"conv": {"maps": 1, "kernel": 1, "stride": 5}},
            {"dense": 4},
        ],
    )


def windows() -> Network:
    """Windows of three and of four, and a kernel of one."""
    return build(
        "windows",
        (1, 38, 26),
        4,
        [
            {"conv": {"maps": 3, "kernel": 3}},
            {"subsample": {"size": 3, "method": "max"}},
            {"conv": {"maps": 50, "kernel": 1}},
            {"subsample": {"size": 4, "method": "mean"}},
            {"conv": {"maps": 5, "kernel": 2}},
            {"dense": 7},
            {"dense": 4},
        ],
    )


def many_maps() -> Network:
    """64 channels, and a kernel as large as its map."""
    return build(
        "many_maps",
        (2, 12, 12),
        4,
        [
            {"conv": {"maps": 64, "kernel": 3}},
            {"subsample": {"size": 2, "method": "mean"}},
            {"conv": {"maps": 5, "kernel": 5}},
            {"dense": 4},
        ],
    )


LINEAR = {network.name: network for network in (strides(), windows(), many_maps())}
"""Networks without activations, in which integers give the same gradient in any arithmetic."""


def curved() -> Network:
    """Means of three and two over activations, behind strides."""
    return build(
        "curved",
        (2, 37, 31),
        6,
        [
            {"conv": {"maps": 5, "kernel": 3, "stride": 2}},
            {"activation": "tanh"},
            {"subsample": {"size": 3, "method": "mean"}},
            {"conv": {"maps": 7, "kernel": 2}},
            {"activation": "sigmoid"},
            {"dense": 6},
        ],
    )


def unusual_order() -> Network:
    """Layers apart that mostly come together, and images that are subsampled first."""
    return build(
        "unusual_order",
        (3, 24, 16),
        5,
        [
            {"subsample": {"size": 2, "method": "max"}},
            {"activation": "tanh"},
            {"conv": {"maps": 6, "kernel": 3}},
            {"subsample": {"size": 2, "method": "mean"}},
            {"activation": "relu"},
            {"activation": "sigmoid"},
            {"dense": 9},
            {"dense": 5},
        ],
    )


UNUSUAL = {network.name: network for network in (curved(), unusual_order())}


def examples() -> Network:
    """The MNIST network of pytorch/examples, without dropout."""
    return build(
        "examples",
        (1, 28, 28),
        10,
        [
            {"conv": {"maps": 32, "kernel": 3}},
            {"activation": "relu"},
            {"conv": {"maps": 64, "kernel": 3}},
            {"activation": "relu"},
            {"subsample": {"size": 2, "method": "max"}},
            {"dense": 128},
            {"activation": "relu"},
            {"dense": 10},
        ],
    )


def padded() -> Network:
    """Padding, kernels and windows that are not square, and windows that overlap or leave gaps."""
    return build(
        "padded",
        (3, 17, 14),
        4,
        [
            {"conv": {"maps": 5, "kernel": [3, 2], "stride": [1, 2], "padding": [2, 1]}},
            {"activation": "gelu"},
            {"subsample": {"size": [3, 2], "stride": [2, 1], "padding": [1, 1]}},
            {"conv": {"maps": 4, "kernel": 3, "padding": 1}},
            {"activation": "scaled_tanh"},
            {"subsample": {"size": 3, "stride": 2, "method": "mean"}},
            {"conv": {"maps": 6, "kernel": [1, 2], "stride": [2, 1], "padding": [0, 2]}},
            {"activation": "leaky_relu"},
            {"dense": 4},
        ],
    )


def overlapping() -> Network:
    """Subsampling of images, with windows that overlap, do not divide the map or lie apart."""
    return build(
        "overlapping",
        (2, 23, 19),
        3,
        [
            {"subsample": {"size": 3, "stride": 2, "padding": 1}},
            {"conv": {"maps": 4, "kernel": 3}},
            {"subsample": {"size": [4, 3], "stride": [1, 2], "method": "mean", "padding": [2, 1]}},
            {"conv": {"maps": 3, "kernel": 2}},
            {"activation": "tanh"},
            {"subsample": {"size": 2, "stride": 3}},
            {"subsample": {"size": [2, 1]}},
            {"dense": 3},
        ],
    )


def dropped() -> Network:
    """Dropout of the images, of maps and of a dense layer's units."""
    return build(
        "dropped",
        (1, 11, 9),
        4,
        [
            {"dropout": 0.1},
            {"conv": {"maps": 5, "kernel": 3}},
            {"activation": "relu"},
            {"subsample": 2},
            {"dropout": 0.25},
            {"dense": 13},
            {"activation": "tanh"},
            {"dropout": 0.5},
            {"dense": 4},
        ],
    )


GENERAL = {network.name: network for network in (padded(), overlapping(), dropped())}
"""What not every stage serves."""


def padded_linear() -> Network:
    """Padding and rectangles without activations, but for maxima that overlap."""
    return build(
        "padded_linear",
        (2, 21, 18),
        4,
        [
            {"conv": {"maps": 5, "kernel": [2, 3], "stride": [2, 1], "padding": [1, 2]}},
            {"subsample": {"size": 3, "stride": 1, "padding": 1}},
            {"conv": {"maps": 7, "kernel": 3, "padding": 1}},
            {"subsample": {"size": [2, 4], "stride": [1, 2], "method": "mean"}},
            {"conv": {"maps": 3, "kernel": [4, 1]}},
            {"dense": 4},
        ],
    )


def large_padding() -> Network:
    """Windows that lie in the padding alone, and a kernel larger than its map."""
    return build(
        "large_padding",
        (1, 4, 6),
        3,
        [
            {"conv": {"maps": 3, "kernel": [2, 9], "padding": [5, 4]}},
            {"subsample": {"size": [5, 4], "stride": [3, 4], "padding": [2, 2]}},
            {"conv": {"maps": 4, "kernel": 1, "stride": 2, "padding": 3}},
            {"dense": 3},
        ],
    )


GENERAL_LINEAR = {network.name: network for network in (padded_linear(), large_padding())}
"""LINEAR networks that not every stage serves."""


def fused_padding() -> Network:
    """Padding and rectangles that can be fused, and windows that leave rows and columns over."""
    return build(
        "fused_padding",
        (2, 13, 11),
        3,
        [
            {"conv": {"maps": 4, "kernel": 3, "padding": 1}},
            {"activation": "relu"},
            {"subsample": 2},
            {"conv": {"maps": 5, "kernel": [3, 2], "stride": [1, 2], "padding": [2, 1]}},
            {"activation": "tanh"},
            {"subsample": [3, 2]},
            {"dense": 3},
        ],
    )


def fused_means() -> Network:
    """Means of rectangles over curved activations, and more padding above than left."""
    return build(
        "fused_means",
        (3, 23, 17),
        4,
        [
            {"conv": {"maps": 6, "kernel": [2, 5], "stride": [2, 1], "padding": [3, 2]}},
            {"activation": "sigmoid"},
            {"subsample": {"size": [2, 3], "method": "mean"}},
            {"conv": {"maps": 8, "kernel": [4, 3], "padding": [2, 1]}},
            {"activation": "scaled_tanh"},
            {"subsample": {"size": [3, 2], "method": "mean"}},
            {"dense": 4},
        ],
    )


def fused_tall() -> Network:
    """Padded maps; stage ring has only some of their rows on chip at once."""
    return build(
        "fused_tall",
        (2, 90, 23),
        3,
        [
            {"conv": {"maps": 4, "kernel": 3, "padding": 1}},
            {"activation": "leaky_relu"},
            {"conv": {"maps": 4, "kernel": [5, 3], "stride": [1, 3], "padding": [2, 1]}},
            {"subsample": {"size": [4, 1]}},
            {"dense": 3},
        ],
    )


FUSED_WINDOWS = {n.name: n for n in (fused_padding(), fused_means(), fused_tall())}
"""Networks whose convolutions stages fused and ring serve with all that follows them."""


def fused_linear() -> Network:
    """Padding, rectangles and rows left over, without activations."""
    return build(
        "fused_linear",
        (2, 21, 18),
        4,
        [
            {"conv": {"maps": 5, "kernel": [2, 3], "stride": [2, 1], "padding": [1, 2]}},
            {"subsample": [2, 3]},
            {"conv": {"maps": 7, "kernel": 3, "padding": 1}},
            {"subsample": {"size": [2, 4], "method": "mean"}},
            {"conv": {"maps": 3, "kernel": 2, "stride": 2, "padding": 3}},
            {"dense": 4},
        ],
    )


FUSED_LINEAR = {network.name: network for network in (fused_linear(),)}
