"""The kernels of every GPU stage compile for the GPUs that have a record, on machines without one.

What is compiled for an H100, which the published times are of, covers many networks. For the other
GPUs it is LeNet-5 and what differs by architecture; `pytest -m every_gpu` compiles every stage and
network for all of them, which takes half an hour of a core the first time.
"""

import re
import subprocess
from pathlib import Path

import pytest

from cnnlib.device import cuda
from cnnlib.device.architecture import A100, B200, H100, KNOWN, RTX_4090, T4, Architecture
from cnnlib.engine import Setup, Stage
from cnnlib.engine.device_engine import DeviceEngine
from cnnlib.engine.gpu_operator import GpuOperator
from cnnlib.errors import Unsupported
from cnnlib.network import Network
from cnnlib.paths import KERNELS
from cnnlib.stages import LADDER, tuned
from cnnlib.stages.tuned.graph import GraphConv
from tests.support.engines import GPU_STAGES, skip_if_declined
from tests.support.networks import GENERAL, awkward, lenet5, shipped, simard

NETWORKS = (
    lenet5(),
    simard(),
    awkward(),
    *GENERAL.values(),
    *(shipped(name) for name in ("pytorch_examples", "vgg6")),
)
FEW = (
    # without tensor cores and asynchronous copies, tuned has other code for almost everything
    *[(T4, stage, lenet5()) for stage in LADDER if stage.runs_on == "cuda"],
    *[(gpu, tuned.PERSISTENT, awkward()) for gpu in (RTX_4090, B200)],
    *[(gpu, tuned.GRAPH, awkward()) for gpu in (T4, A100, B200)],
    (H100, tuned.GRAPH, GENERAL["dropped"]),
)
"""GPU, stage and network: code that no other compilation covers."""

needs_nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")


def compiles(stage: Stage, network: Network, gpu: Architecture) -> None:
    """With the flags of the device, and for the limits of the GPU."""
    engine, setup = stage.engine, Setup(network, batch_size=16, learning_rate=0.1)
    assert issubclass(engine, DeviceEngine)
    source = engine.source_on(stage, setup, gpu.limits)
    kernels = engine.kernels_on(stage, setup, gpu.limits)
    cubin = cuda.compile_cubin(source, f"{stage.name}_{network.name}", gpu.sm, ())
    assert kernels
    for kernel in kernels:
        assert f".text.{kernel}".encode() in cubin


@needs_nvcc
@pytest.mark.parametrize("network", NETWORKS, ids=lambda each: each.name)
@pytest.mark.parametrize("stage", GPU_STAGES, ids=lambda stage: stage.name)
def test_stage_compiles_for_a_gpu(stage: Stage, network: Network) -> None:
    skip_if_declined(stage, network)
    compiles(stage, network, H100)


@needs_nvcc
@pytest.mark.parametrize(
    ("gpu", "stage", "network"), FEW, ids=[f"{gpu.sm}-{stage.title}" for gpu, stage, _ in FEW]
)
def test_stage_compiles_for_another_gpu(gpu: Architecture, stage: Stage, network: Network) -> None:
    compiles(stage, network, gpu)


@needs_nvcc
@pytest.mark.parametrize("network", [GENERAL["dropped"], lenet5()], ids=lambda each: each.name)
def test_a_kernel_that_is_launched_early_touches_nothing_before_it_waits(
    network: Network, tmp_path: Path
) -> None:
    """The compiler may move loads from arguments that are const and __restrict__: it did not.

    A head and its update load what older kernels wrote before they wait; what the last one wrote
    they load by instructions that say so.
    """
    setup, engine = Setup(network, 16, 0.1), tuned.GRAPH.engine
    (tmp_path / "k.cu").write_text(engine.source_on(tuned.GRAPH, setup, H100.limits))
    command = [str(cuda.find_nvcc()), "-ptx", f"-arch={H100.sm}", "-std=c++17", "-w", "-O3"]
    command += ["-I", str(KERNELS), "-o", "k.ptx", "k.cu"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    programmatic = {"batch_gather_images", "batch_update_and_count", "batch_sum_update_and_count"}
    early = {"head_run", "step_update"}
    programmatic |= early
    for operator in engine.operators_on(tuned.GRAPH, setup, H100.limits):
        assert isinstance(operator, GpuOperator)
        apart = not (isinstance(operator, GraphConv) and operator.in_head)
        programmatic |= set(operator.entry_points() if operator.waits and apart else ())
    seen = set()
    for text in (tmp_path / "k.ptx").read_text().split(".visible .entry ")[1:]:
        name = text.partition("(")[0]
        if name in programmatic:
            every = r"\b(ld|st|red|atom)\.(\w+\.)*global|cp\.async"
            late = r"\b(st|red|atom)\.(\w+\.)*global|\bld\.global\.cg"
            touched = re.search(late if name in early else every, text)
            assert touched
            assert 0 <= text.find("griddepcontrol.wait") < touched.start(), name
            seen.add(name)
    assert seen == programmatic
    assert len(seen) > 8


@pytest.mark.every_gpu
@needs_nvcc
@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.sm)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda each: each.name)
@pytest.mark.parametrize("stage", [*GPU_STAGES, tuned.GRAPH], ids=lambda stage: stage.title)
def test_every_stage_compiles_for_every_gpu(
    request: pytest.FixtureRequest, stage: Stage, network: Network, gpu: Architecture
) -> None:
    if "every_gpu" not in request.config.option.markexpr:
        pytest.skip("takes long: only with -m every_gpu")
    try:
        compiles(stage, network, gpu)
    except Unsupported as declined:
        pytest.skip(str(declined))
