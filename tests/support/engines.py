"""Stages, engines and images that tests of stages share."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from cnnlib.device import Device
from cnnlib.device.architecture import H100
from cnnlib.engine import Bytes, Engine, Setup, Stage, options_of
from cnnlib.engine.plans import EngineOfPlans, Plans
from cnnlib.errors import Unsupported
from cnnlib.network import Network
from cnnlib.stages import LADDER, VARIANTS

Limited = Callable[..., Device]
"""The type of the fixture `limited`."""

STAGES = [
    options_of(stage, Plans).plans["persistent"] if stage.engine is EngineOfPlans else stage
    for stage in (*LADDER, *VARIANTS)
]
"""The stages, and of one with plans the first plan.

tests/stages/test_plans.py is about such a stage itself, test_graph_plan.py about its other plan.
"""
GPU_STAGES = [stage for stage in STAGES if stage.runs_on == "cuda"]


SERVE_ALL = {"naive", "gemm", "gemm_cuda", "fused", "fused_pull", "ring"}
"""Stages with an operator for every layer here. Others may decline one, by name and with a reason;
docs/stages/layers.md says which."""


def skip_if_declined(stage: Stage, network: Network, **training: Any) -> None:
    """Skip the test if the stage has no operator for one of the network's layers.

    `training` are settings of a Setup that an engine may have no kernel for. Stages of SERVE_ALL
    are held to what they promise, but for maps that are too large for them.
    """
    setup = Setup(network, batch_size=16, learning_rate=0.1, **training)
    try:
        stage.engine.operators_on(stage, setup, H100.limits)
    except Unsupported as declined:
        if stage.name in SERVE_ALL and "shared memory, which takes" not in str(declined):
            raise
        pytest.skip(str(declined))


def each_of(stages: Iterable[Stage]) -> pytest.MarkDecorator:
    """Run a test once for each of these stages, as its argument `stage`."""
    return pytest.mark.parametrize("stage", list(stages), ids=lambda stage: stage.name)


def on(*networks: Network) -> pytest.MarkDecorator:
    """Run a test once for each of these networks, as its argument `network`."""
    return pytest.mark.parametrize("network", networks, ids=[network.name for network in networks])


each_gpu_stage = each_of(GPU_STAGES)


def pictures(network: Network, count: int, seed: int = 0) -> tuple[Bytes, Bytes]:
    """Random images, half of them with a dark background like digits, and labels."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *network.input_shape), dtype=np.uint8)
    images[::2, :, :3] = 0
    images[::2, :, :, -4:] = 0
    return images, generator.integers(0, network.classes, count).astype(np.uint8)


def open_engine(
    stage: Stage, network: Network, batch_size: int, device: Device | None = None, **options: Any
) -> Engine:
    """An engine with initial parameters."""
    settings = dict(learning_rate=0.05, mean=33.3, deviation=78.6) | options
    engine = stage.engine(stage, Setup(network, batch_size, **settings), device)
    engine.parameters = network.initial_parameters(1)
    return engine


def training(
    stage: Stage,
    network: Network,
    batch_size: int,
    count: int,
    device: Device | None = None,
    **options: Any,
) -> Engine:
    """An engine with `count` random images loaded."""
    engine = open_engine(stage, network, batch_size, device, **options)
    engine.load(*pictures(network, count))
    return engine
