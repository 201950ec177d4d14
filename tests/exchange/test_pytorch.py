"""Networks as modules of PyTorch, state_dicts of others, and the models that PyTorch exports.

Skipped where PyTorch is not installed.
"""

import importlib.util
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cnnlib.errors import DataError
from cnnlib.exchange.agreement import own_logits, with_onnxruntime
from cnnlib.exchange.formats import load_weights
from cnnlib.exchange.weights import Weights
from cnnlib.layers import Activation, Conv, Dense, Dropout, Subsample
from cnnlib.network import Network

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if TYPE_CHECKING:
    import torch

F = torch.nn.functional

LAYERS = (
    Conv(maps=3, kernel=3, padding=1),
    Activation(function="scaled_tanh"),
    Subsample(size=2),
    Dropout(rate=0.5),
    Dense(units=5),
    Activation(function="gelu"),
    Dense(units=4),
)
NETWORK = Network("toy", (1, 6, 6), 4, LAYERS)
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 1, 6, 6), dtype=np.uint8)


def parameters() -> np.ndarray:
    return NETWORK.initial_parameters(7) + np.float32(0.01)


class Mnist(torch.nn.Module):
    """The network of pytorch/examples, mnist/main.py, smaller."""

    def __init__(self, maps: int = 4) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, maps, 3, 1)
        self.conv2 = torch.nn.Conv2d(maps, 2 * maps, 3, 1)
        self.dropout1 = torch.nn.Dropout(0.25)
        self.dropout2 = torch.nn.Dropout(0.5)
        self.fc1 = torch.nn.Linear(2 * maps * 144, 16)
        self.fc2 = torch.nn.Linear(16, 10)

    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = self.dropout2(F.relu(self.fc1(torch.flatten(x, 1))))
        return F.log_softmax(self.fc2(x), dim=1)


class LeNet5(torch.nn.Module):
    """LeNet-5 with padding, as tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = torch.nn.Conv2d(6, 16, 5)
        self.fc1 = torch.nn.Linear(400, 120)
        self.fc2 = torch.nn.Linear(120, 84)
        self.fc3 = torch.nn.Linear(84, 10)

    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.max_pool2d(F.gelu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(torch.sigmoid(self.fc2(F.leaky_relu(self.fc1(x)))))


def layers_of(module: "torch.nn.Module") -> tuple[Any, ...]:
    relu, padding = Activation(function="relu"), isinstance(module, LeNet5)
    if not padding:
        return (
            *(Conv(maps=4, kernel=3), relu, Conv(maps=8, kernel=3), relu, Subsample(size=2)),
            *(Dense(units=16), relu, Dense(units=10)),
        )
    return (
        *(Conv(maps=6, kernel=5, padding=2), Activation(function="tanh")),
        *(Subsample(size=2, method="mean"), Conv(maps=16, kernel=5)),
        *(Activation(function="gelu"), Subsample(size=2), Dense(units=120)),
        *(Activation(function="leaky_relu"), Dense(units=84), Activation(function="sigmoid")),
        Dense(units=10),
    )


@pytest.mark.parametrize("normalised", [True, False])
def test_the_module_computes_the_same_logits(normalised: bool) -> None:
    weights = Weights(NETWORK, parameters(), 30.0, 70.0)
    ours = own_logits(weights, IMAGES)
    if normalised:
        module, source = NETWORK.to_torch(weights.parameters), (IMAGES.astype(np.float32) - 30) / 70
    else:
        module, source = NETWORK.to_torch(weights.parameters, (30.0, 70.0)), IMAGES
    theirs = module(torch.from_numpy(source)).detach().numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-6)
    assert not module.training


def test_its_state_dict_has_the_names_of_the_parameters() -> None:
    vector = parameters()
    module = NETWORK.to_torch(vector, (30.0, 70.0))
    state = NETWORK.state_dict(vector)
    names = [p.name for p in NETWORK.parameters]
    assert list(module.state_dict()) == list(state) == names
    other = NETWORK.to_torch(np.zeros_like(vector))
    other.load_state_dict(state)
    np.testing.assert_array_equal(NETWORK.from_torch(other), vector)
    state["conv1.bias"] += 1  # a copy
    np.testing.assert_array_equal(vector, parameters())


def test_a_module_trains_and_comes_back() -> None:
    module = NETWORK.to_torch(parameters(), (30.0, 70.0)).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    labels = torch.arange(9) % 4
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module(torch.from_numpy(IMAGES)), labels).backward()
        optimizer.step()
    vector = NETWORK.from_torch(module)
    assert np.abs(vector - parameters()).max() > 1e-3
    theirs = module.eval()(torch.from_numpy(IMAGES)).detach().numpy()
    ours = own_logits(Weights(NETWORK, vector, 30.0, 70.0), IMAGES)
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_a_whole_module_can_be_pickled() -> None:
    stream = io.BytesIO()
    module = NETWORK.to_torch(parameters(), (30.0, 70.0))
    torch.save(module, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    images = torch.from_numpy(IMAGES)
    assert torch.equal(again(images), module(images))


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    NETWORK.to_torch(parameters())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_precisions(dtype: str) -> None:
    state = {k: v.to(getattr(torch, dtype)) for k, v in NETWORK.state_dict(parameters()).items()}
    expected = torch.cat([tensor.float().reshape(-1) for tensor in state.values()]).numpy()
    np.testing.assert_array_equal(NETWORK.from_torch(state), expected)


def test_names_of_other_programs() -> None:
    """As they come from torch.compile, DataParallel or a Sequential."""
    state = NETWORK.state_dict(parameters())
    for rename in (
        lambda i, name: f"_orig_mod.{name}",
        lambda i, name: f"module.{name}",
        lambda i, name: f"{i // 2}.{'weight' if i % 2 == 0 else 'bias'}",
    ):
        renamed = {rename(i, name): tensor for i, (name, tensor) in enumerate(state.items())}
        np.testing.assert_array_equal(NETWORK.from_torch(renamed), parameters())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda s: s | {"dense1.weight": s["dense1.weight"].T},
            "for network 'toy': tensor dense1.weight has shape (27, 5), expected (5, 27)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "dense2.bias"},
            "state_dict for network 'toy': there is no tensor for dense2.bias of shape (4,)",
        ),
        (
            lambda s: s | {"bn1.num_batches_tracked": torch.tensor(5)},
            "tensor bn1.num_batches_tracked of shape () belongs to no layer",
        ),
        (
            lambda s: s | {"conv1.bias": torch.full((3,), torch.nan)},
            "tensor conv1.bias has elements that are not finite",
        ),
    ],
)
def test_state_dicts_that_do_not_fit(change: Any, problem: str) -> None:
    with pytest.raises(DataError, match=re.escape(problem)):
        NETWORK.from_torch(change(NETWORK.state_dict(parameters())))


def test_what_is_no_state_dict() -> None:
    with pytest.raises(TypeError, match="a state_dict or a module is expected, not list"):
        NETWORK.from_torch([1, 2])
    with pytest.raises(TypeError, match=r"conv1.bias of the state_dict is str, not a tensor"):
        NETWORK.from_torch(NETWORK.state_dict(parameters()) | {"conv1.bias": "x"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", [Mnist, LeNet5])
def test_what_pytorch_exports(tmp_path: Path, kind: Any, exporter: str, opset: int) -> None:
    dynamo = exporter == "dynamo"
    if dynamo and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    if dynamo and opset < 18:
        pytest.skip("this exporter writes opset 18 at the least")
    torch.manual_seed(0)
    module, path = kind().eval(), tmp_path / "model.onnx"
    images = torch.randn(2, 1, 28, 28)
    if dynamo:
        batch = {"x": {0: torch.export.Dim("batch")}}
        options = {"dynamic_shapes": batch, "verbose": False}
    else:
        options = {"dynamic_axes": {"images": {0: "batch"}}, "input_names": ["images"]}
    torch.onnx.export(module, (images,), path, dynamo=dynamo, opset_version=opset, **options)
    weights = load_weights(path, mean=33.3285, deviation=78.5655)
    assert weights.network.layers == layers_of(module)
    for ours, theirs in zip(weights.tensors.values(), module.state_dict().values(), strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    pixels = np.random.default_rng(1).integers(0, 256, (9, 1, 28, 28), dtype=np.uint8)
    difference = with_onnxruntime(path, weights, pixels)
    assert difference.agrees, difference
