"""Random networks come back from every format as they were, and other programs agree on them."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given

from cnnlib.exchange import onnx_export
from cnnlib.exchange.agreement import own_logits, with_onnxruntime
from cnnlib.exchange.formats import load_weights, save_weights
from cnnlib.exchange.weights import Weights
from tests.fuzz.support import inputs
from tests.support.random_networks import pictures, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".onnx"])
@inputs(60)
@given(saved=weights())
def test_every_format_keeps_everything(folder: Path, ending: str, saved: Weights) -> None:
    path = folder / f"w{ending}"
    save_weights(path, saved)
    found = load_weights(path)
    np.testing.assert_array_equal(found.parameters, saved.parameters)
    for name in ("network", "mean", "deviation", "class_names", "steps", "origin", "version"):
        assert getattr(found, name) == getattr(saved, name), name
    before = path.read_bytes()
    save_weights(path, found)
    assert path.read_bytes() == before


@pytest.mark.parametrize("images", ["uint8", "float32"])
@inputs(40)
@given(saved=weights())
def test_onnxruntime_agrees(folder: Path, images: onnx_export.Images, saved: Weights) -> None:
    path = folder / "w.onnx"
    onnx_export.write(path, saved, images)
    difference = with_onnxruntime(path, saved, pictures(saved))
    assert difference.agrees, difference
    assert load_weights(path).mean == saved.mean


@pytest.fixture
def torch() -> Iterator[ModuleType]:
    """PyTorch on one thread: two would wait for each other at every layer of a busy machine."""
    found = pytest.importorskip("torch", reason="PyTorch is not installed")
    threads = found.get_num_threads()
    found.set_num_threads(1)
    yield found
    found.set_num_threads(threads)


@inputs(40)
@given(saved=weights())
def test_pytorch_agrees(torch: ModuleType, saved: Weights) -> None:
    network, images = saved.network, pictures(saved)
    module = network.to_torch(saved.parameters, (saved.mean, saved.deviation))
    theirs = module(torch.from_numpy(images)).detach().numpy()
    ours = own_logits(saved, images)
    np.testing.assert_allclose(theirs, ours, atol=3e-5 * max(np.abs(ours).max(), 1e-3), rtol=0)
    state = module.state_dict()
    assert list(state) == [p.name for p in network.parameters]
    np.testing.assert_array_equal(network.from_torch(state), saved.parameters)
    renamed = {f"model.{i}": tensor for i, tensor in enumerate(state.values())}
    np.testing.assert_array_equal(network.from_torch(renamed), saved.parameters)
