"""The kernels of every GPU stage compile for an H100, on machines without one too."""

from collections.abc import Sequence

import pytest

from cnnlib.device import cuda
from cnnlib.device.host import HostDevice, HostModule
from cnnlib.engine import Setup
from cnnlib.stages import LADDER, VARIANTS
from tests.support.networks import awkward, lenet5, simard

STAGES = [stage for stage in (*LADDER, *VARIANTS) if stage.runs_on == "cuda"]


class Asked(Exception):
    """What a device was asked to compile; the host need not build it here."""


class AskedDevice(HostDevice):
    def compile(
        self, source: str, name: str, kernels: Sequence[str], flags: Sequence[str] = ()
    ) -> HostModule:
        raise Asked(source, name, kernels, flags)


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("network", [lenet5, simard, awkward], ids=lambda make: make.__name__)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage_compiles_for_a_gpu(stage, network) -> None:
    setup = Setup(network(), batch_size=16, learning_rate=0.1)
    with pytest.raises(Asked) as caught, AskedDevice() as device:
        stage.engine(stage, setup, device)
    source, name, kernels, flags = caught.value.args
    cubin = cuda.compile_cubin(source, name, "sm_90", flags)
    assert kernels
    for kernel in kernels:
        assert f".text.{kernel}".encode() in cubin
