"""Stage gemm with windows of any size, stride and padding: integers are exact, as in the loops."""

from collections.abc import Iterator

import numpy as np
import pytest

from cnnlib.engine.cpu import MicroBatchEngine
from cnnlib.layers import Conv, Dense, Layer, Subsample
from cnnlib.network import Network
from cnnlib.stages import gemm
from cnnlib.stages.gemm.windows import Windows
from cnnlib.validation.spot_checks import exact
from tests.support.engines import open_engine

pytestmark = pytest.mark.quick

Pair = tuple[int, int]


def conv(kernel: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Conv:
    return Conv(maps=3, kernel=kernel, stride=stride, padding=padding)


def pool(method: str, size: Pair, stride: Pair | None = None, padding: Pair = (0, 0)) -> Subsample:
    return Subsample.model_validate(
        {"method": method, "size": size, "stride": stride, "padding": padding}
    )


def layers() -> Iterator[Layer]:
    yield conv((1, 1), padding=(3, 2))  # some windows see nothing but padding
    yield conv((1, 1), stride=(9, 9), padding=(2, 2))  # the only window sees nothing else
    yield conv((3, 3), padding=(1, 1))
    yield conv((5, 2), padding=(0, 4))
    yield conv((2, 5), stride=(3, 1), padding=(1, 0))  # rows between windows
    yield conv((4, 3), stride=(2, 4), padding=(3, 1))
    yield conv((3, 4), stride=(3, 2), padding=(4, 3))
    yield conv((8, 7))  # one window, as large as the map
    for method in ("max", "mean"):  # a mean of 1, 2, 4 or 8 numbers is exact
        yield pool(method, (1, 1), (2, 3))
        yield pool(method, (2, 2))  # the map's last column is left out
        yield pool(method, (2, 2), (1, 1), (1, 1))
        yield pool(method, (4, 2), (1, 3), (2, 0))
        yield pool(method, (2, 4), (3, 2), (0, 2))
        yield pool(method, (8, 1))
    yield pool("max", (3, 3), (2, 2), (1, 1))
    yield pool("max", (3, 5), (5, 1), (1, 2))


def name(layer: Layer) -> str:
    return " ".join([layer.kind, *(str(value) for value in layer.settings.values())])


def integers_are_exact(layer: Layer, batch_size: int, height: int) -> None:
    """The convolutions around the layer have gradients that depend on the errors it passes on."""
    network = Network.from_layers(
        (2, height, 9), 4, [Conv(maps=2, kernel=(3, 3)), layer, {"dense": 4}], name="windows"
    )
    generator = np.random.default_rng(3)
    # small numbers, so that windows have ties, negative ones as well
    images = generator.integers(0, 3, (batch_size, 2, height, 9), dtype=np.uint8)
    with open_engine(gemm.STAGE, network, batch_size, mean=1, deviation=1) as engine:
        engine.parameters = generator.integers(-1, 2, network.parameter_count)
        # multiples of 8, whose means of 8 are integers
        exact(engine, images, 8 * generator.integers(-2, 3, (batch_size, 4)))


@pytest.mark.parametrize("batch_size", [1, 7, 65])
@pytest.mark.parametrize("layer", list(layers()), ids=name)
def test_integers_are_exact(layer: Layer, batch_size: int) -> None:
    integers_are_exact(layer, batch_size, height=10)


@pytest.mark.parametrize("small", [False, True], ids=["whole products", "small products"])
@pytest.mark.parametrize("layer", [each for each in layers() if isinstance(each, Conv)], ids=name)
def test_integers_are_exact_row_by_row(
    layer: Layer, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large rows are taken one by one, and products are cut to make them small."""
    monkeypatch.setattr("cnnlib.stages.gemm.conv.GROUP", 1)
    if small:
        monkeypatch.setattr("cnnlib.stages.gemm.conv.SHORTEST", 1)
        monkeypatch.setattr("cnnlib.stages.gemm.conv.SMALL", 200)
    integers_are_exact(layer, 7, height=10)


@pytest.mark.parametrize("batch_size", [1, 65])
@pytest.mark.parametrize(
    ("cached", "height"), [(1, 10), (2**20, 10), (2**20, 9)], ids=["pair by pair", "even", "odd"]
)
@pytest.mark.parametrize(
    "layer",
    [
        conv((3, 3), padding=(1, 1)),
        conv((3, 3)),
        conv((3, 1), padding=(5, 2)),  # pairs of rows that see nothing but padding
        conv((3, 4), padding=(0, 5)),
        conv((3, 2), padding=(2, 0)),
    ],
    ids=name,
)
def test_integers_are_exact_with_fewer_multiplications(
    layer: Layer, cached: int, height: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves of small integers are exact, too; the target has an even or an odd number of rows."""
    monkeypatch.setattr("cnnlib.stages.gemm.winograd.FEWEST", 1)
    monkeypatch.setattr("cnnlib.stages.gemm.winograd.MOST", np.inf)
    monkeypatch.setattr("cnnlib.stages.gemm.winograd.CACHED", cached)
    integers_are_exact(layer, batch_size, height)


def test_wide_convolutions_take_fewer_multiplications() -> None:
    wide = Conv(maps=32, kernel=(3, 3), padding=(1, 1))
    unpadded = Conv(maps=32, kernel=(3, 3))
    layers: list[Layer] = [wide, wide, unpadded, Dense(units=4)]
    network = Network.from_layers((2, 6, 6), 4, layers, name="wide")
    with open_engine(gemm.STAGE, network, 4) as engine:
        assert isinstance(engine, MicroBatchEngine)
        kinds = [type(operator) for operator in engine.lane.operators]
    assert kinds == [gemm.MatrixConv, gemm.WinogradConv, gemm.MatrixConv, gemm.MatrixDense]


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_windows_meet_the_elements_that_they_have(size: int, stride: int, padding: int) -> None:
    length = 8
    count = (length + 2 * padding - size) // stride + 1
    windows = Windows(length, size, stride, padding, count)
    assert len(windows.meetings) == size
    for place, (met, elements) in enumerate(windows.meetings):
        found = zip(np.arange(count)[met], np.arange(length)[elements], strict=True)
        everywhere = ((k, k * stride - padding + place) for k in range(count))
        assert list(found) == [(k, e) for k, e in everywhere if 0 <= e < length]
    seen = [e for _, elements in windows.meetings for e in np.arange(length)[elements]]
    assert windows.cover == (sorted(seen) == list(range(length)) and not padding)
