"""The kernels of every GPU stage compile for an H100, on machines without one too."""

import pytest

from cnnlib.device import cuda
from cnnlib.device.architecture import H100
from cnnlib.engine import Setup, Stage
from cnnlib.engine.device_engine import DeviceEngine
from cnnlib.network import Network
from tests.support.engines import GPU_STAGES, skip_if_declined
from tests.support.networks import GENERAL, awkward, lenet5, shipped, simard

NETWORKS = (
    lenet5(),
    simard(),
    awkward(),
    *GENERAL.values(),
    *(shipped(name) for name in ("pytorch_examples", "vgg6")),
)


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("network", NETWORKS, ids=lambda each: each.name)
@pytest.mark.parametrize("stage", GPU_STAGES, ids=lambda stage: stage.name)
def test_stage_compiles_for_a_gpu(stage: Stage, network: Network) -> None:
    skip_if_declined(stage, network)
    engine, setup = stage.engine, Setup(network, batch_size=16, learning_rate=0.1)
    assert issubclass(engine, DeviceEngine)
    source = engine.source_on(stage, setup, H100.limits)
    kernels = engine.kernels_on(stage, setup, H100.limits)
    cubin = cuda.compile_cubin(source, f"{stage.name}_{network.name}", "sm_90", ())
    assert kernels
    for kernel in kernels:
        assert f".text.{kernel}".encode() in cubin
