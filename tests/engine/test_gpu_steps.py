"""The ways to launch a step and to gather its images: all of them train alike, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

from cnnlib.device import Device
from cnnlib.engine import Stage
from cnnlib.engine.gpu import GpuEngine
from cnnlib.engine.gpu_operator import GpuOptions
from cnnlib.engine.gpu_steps import GRAPH_LAUNCHES, graph_sizes
from cnnlib.engine.shuffle import Shuffle
from cnnlib.errors import Unsupported
from cnnlib.network import Network
from cnnlib.stages import fused, gemm_cuda
from tests.support.engines import training
from tests.support.networks import awkward, build

COUNT, BATCH = 44, 8  # five steps and a rest
WAYS = [
    ("graph", "device"),
    ("programmatic", "device"),
    ("each", "device"),
    ("graph", "host"),
    ("programmatic", "host"),
]
DROPPING = build(
    "dropping",
    (2, 9, 9),
    3,
    [
        {"conv": {"maps": 3, "kernel": 4}},
        {"activation": "relu"},
        {"dropout": 0.5},
        {"dense": 3},
    ],
)
"""An image of 162 pixels of two channels, which no four divide."""


def variant(stage: Stage, launch: str, gather: str) -> Stage:
    return replace(stage, options=GpuOptions(launch=launch, gather=gather))  # type: ignore[arg-type]


@pytest.fixture
def capturing(device: Device) -> Device:
    if problem := device.capture_problem():
        pytest.skip(problem)
    return device


def two_epochs(stage: Stage, network: Network, device: Device, **options) -> list:
    """Losses, parameters and velocity after an epoch drawn where the engine chooses, one whose
    order is given and two steps more, at rates that change, and what comes of a gradient between.
    """
    settings = {"momentum": 0.9, "weight_decay": 0.01, "seed": 2**40 + 5} | options
    found = []
    with training(stage, network, BATCH, COUNT, device, **settings) as engine:
        rates = np.linspace(0.01, 0.05, COUNT // BATCH)
        found.append(engine.train_epoch(Shuffle(COUNT, 3, 1), rates))
        images = np.full((3, *network.input_shape), 7, np.uint8)
        found.append(engine.gradient(images, np.zeros(3, np.uint8))[1])
        engine.profile()
        found.append(engine.train(Shuffle(COUNT, 3, 2).indices(), rates[::-1]))
        found.append(engine.train(np.arange(2 * BATCH)[::-1]))
        assert engine.steps == 12
        found += [engine.parameters, engine.velocity, engine.logits(images)]
    return found


@pytest.mark.parametrize(
    ("stage", "network"),
    [(gemm_cuda.STAGE, DROPPING), (fused.STAGE, awkward())],
    ids=["gemm_cuda-dropping", "fused-awkward"],
)
def test_every_way_trains_alike(stage: Stage, network: Network, capturing: Device) -> None:
    expected = two_epochs(stage, network, capturing)
    for way in WAYS:
        found = two_epochs(variant(stage, *way), network, capturing)
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=str(way))


@pytest.mark.parametrize("way", WAYS[1:4:2])
def test_a_training_set_that_does_not_fit_comes_in_loads(
    way: tuple[str, str], capturing: Device
) -> None:
    stage = gemm_cuda.STAGE
    expected = two_epochs(stage, DROPPING, capturing)
    found = two_epochs(variant(stage, *way), DROPPING, capturing, resident_images=20)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_array_equal(expected[4], found[4])


def test_the_host_makes_few_calls(capturing: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    stage = variant(gemm_cuda.STAGE, "graph", "device")
    with training(stage, DROPPING, 1, 200, capturing) as engine:
        assert isinstance(engine, GpuEngine)
        engine.train_epoch(Shuffle(200, 3, 1))
        steps = engine._loaded()
        launches = len(steps._launches)
        sizes = graph_sizes(200, launches)
        assert set(sizes) == set(steps._graphs)
        for size, graph in steps._graphs.items():
            assert graph.launches == size * launches <= GRAPH_LAUNCHES
            one = graph.launch
            monkeypatch.setattr(graph, "launch", lambda one=one: (made.append("graph"), one()))
        engine.train_epoch(Shuffle(200, 3, 2))
        assert len(made) == len(sizes) < 20
        assert sorted(steps._graphs) == sorted(set(sizes))  # none was captured for this epoch


@pytest.mark.parametrize("launches", [1, 9, 20, 700, 5000])
def test_graphs_make_up_every_number_of_steps(launches: int) -> None:
    most = max(1, GRAPH_LAUNCHES // launches)
    for steps in (*range(1, 70), 937, 3750):
        sizes = graph_sizes(steps, launches)
        assert sum(sizes) == steps
        assert max(sizes) <= most
        assert sorted(sizes, reverse=True) == list(sizes)
        assert len(sizes) <= steps // (most // 2 + 1) + 11
    assert not graph_sizes(0, launches)


def test_where_nothing_can_be_captured(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(device), "capture_problem", lambda self: "no cuda-bindings")
    stage = variant(gemm_cuda.STAGE, "graph", "device")
    with pytest.raises(Unsupported, match="'gemm_cuda' launches .* CUDA graphs: no cuda-bindings"):
        training(stage, DROPPING, 4, 8, device)
    training(variant(gemm_cuda.STAGE, "each", "device"), DROPPING, 4, 8, device).close()
