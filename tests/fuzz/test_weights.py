"""Files of weights, damaged at random: weights that are sound, or one line that names the file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from cnnlib.exchange.formats import FORMATS, load_weights, save_weights
from cnnlib.exchange.weights import Weights
from cnnlib.layers import Activation, Conv, Dense, Dropout, Subsample
from cnnlib.network import Network
from tests.fuzz.support import CHANGES, Change, damaged, inputs, refusal

LAYERS = (
    Conv(maps=2, kernel=[3, 2], padding=1),
    Activation(function="scaled_tanh"),
    Subsample(size=2),
    Dropout(rate=0.25),
    Dense(units=3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """The content of a good file of each format that can be written here."""
    network = Network("fuzzed", (2, 6, 5), 3, LAYERS)
    weights = Weights(network, network.initial_parameters(1), (1.0, 2.0), 3.0, {}, ("a", "b", "c"))
    found = {}
    for ending in FORMATS:
        if ending in (".pt", ".pth"):
            continue
        save_weights(folder / f"good{ending}", weights)
        found[ending] = (folder / f"good{ending}").read_bytes()
    return found


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".onnx"])
@inputs(300)
@given(changes=CHANGES)
def test_damaged_files(
    folder: Path, whole: dict[str, bytes], ending: str, changes: list[Change]
) -> None:
    path = folder / f"damaged{ending}"
    path.write_bytes(damaged(whole[ending], changes))
    found, said = refusal(lambda: load_weights(path))
    if found is None:
        assert str(path) in str(said)
        return
    assert found.parameters.dtype == np.float32
    assert found.parameters.shape == (found.network.parameter_count,)
    assert np.isfinite(found.parameters).all()
    assert (np.asarray(found.deviation) > 0).all()


def test_damaged_state_dicts(folder: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    network = Network("fuzzed", (2, 6, 5), 3, LAYERS)
    path = folder / "damaged.pt"
    torch.save(network.state_dict(network.initial_parameters(1)), path)
    good = path.read_bytes()

    @inputs(200)
    @given(changes=CHANGES)
    def damage(changes: list[Change]) -> None:
        path.write_bytes(damaged(good, changes))
        found, said = refusal(lambda: load_weights(path, network, 0.0, 1.0))
        assert found is not None or str(path) in str(said)

    damage()
