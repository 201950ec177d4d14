"""Emulated with the limits of the GPUs that have a record, every GPU stage trains right.

Those of an H100 are the usual ones of an emulated device, so that all other tests are of them.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cnnlib.device import Device, cuda
from cnnlib.device.architecture import A100, H100, RTX_4090, T4, Architecture
from cnnlib.engine import Setup
from cnnlib.errors import Unsupported
from cnnlib.paths import KERNELS
from cnnlib.stages import LADDER, tuned
from cnnlib.stages.tuned import PERSISTENT as STAGE
from cnnlib.stages.tuned.engine import PersistentEngine
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import five_steps
from tests.support.engines import Limited, each_of, open_engine, pictures
from tests.support.networks import awkward, build, lenet5, shipped, simard

NEWER = (
    "mma.sync",
    "mma.sync.aligned.m16n8k16",
    "cp.async",
    "max.NaN",
    "cp.async.bulk",
    "mbarrier.try_wait",
)
"""Instructions of kernels/tuned/ that not all GPUs have."""


def ptx(source: str, name: str, architecture: str, flags: Sequence[str] = ()) -> bytes:
    """Code for a virtual GPU, such as compute_75, which a driver translates for any newer one."""
    with TemporaryDirectory() as folder:
        target = Path(folder) / "code.ptx"
        command = [cuda.find_nvcc() or "nvcc", "-ptx", f"-arch={architecture}", "-std=c++17", "-w"]
        subprocess.run(
            [*command, *flags, "-I", str(KERNELS), "-x", "cu", "-", "-o", str(target)],
            input=source,
            text=True,
            check=True,
        )
        return target.read_bytes() + b"\0"


def emulated(limited: Limited, gpu: Architecture) -> Device:
    """A device that plans as such a GPU would."""
    return limited(
        multiprocessors=gpu.multiprocessors,
        shared_bytes=gpu.shared_bytes,
        capability=gpu.capability,
    )


@pytest.mark.usefixtures("in_haste")
@pytest.mark.parametrize(
    ("gpu", "on_chip"),
    [(T4, ["dense3"]), (A100, ["dense2", "dense3"]), (RTX_4090, ["dense2", "dense3"])],
    ids=["t4", "a100", "rtx4090"],
)
def test_weights_that_do_not_fit_stay_in_device_memory(
    limited: Limited, gpu: Architecture, on_chip: list[str]
) -> None:
    network, device = lenet5(), emulated(limited, gpu)
    with open_engine(STAGE, network, 5, device) as engine:
        assert isinstance(engine, PersistentEngine)
        assert engine.grid == gpu.multiprocessors
        assert engine.block.weights_in_shared == ["conv1", "conv2", *on_chip]
        (planned,) = engine.plans_on(STAGE, engine.setup, gpu.limits)
        assert planned.facts.items() >= engine.block.facts.items()
        validate(engine, *pictures(network, 5))
        five_steps(engine, *pictures(network, 15))


@pytest.mark.usefixtures("in_haste")
@each_of(stage for stage in LADDER if stage.runs_on == "cuda")
def test_a_t4_trains_alike(limited: Limited, stage) -> None:
    """More images than it has multiprocessors, so that blocks of tuned take two together."""
    network, count = awkward(), 50
    with open_engine(stage, network, count, emulated(limited, T4)) as engine:
        validate(engine, *pictures(network, count))
        five_steps(engine, *pictures(network, 2 * count))


def test_a_t4_has_just_room_for_simards_network(limited: Limited) -> None:
    """Where parameters that are used as they come have no second place."""
    network = simard()
    with open_engine(STAGE, network, 4, emulated(limited, T4)) as engine:
        assert isinstance(engine, PersistentEngine)
        assert engine.block.weights_in_shared == ["conv1", "conv2"]
        assert 64_000 < engine.block.layout.bytes <= T4.shared_bytes
        validate(engine, *pictures(network, 4))
        five_steps(engine, *pictures(network, 12))


@pytest.mark.parametrize("gpu", [T4, RTX_4090], ids=["t4", "rtx4090"])
def test_what_does_not_fit_is_refused_by_name(gpu: Architecture) -> None:
    """Other than on an A100, which has room for it."""
    setup = Setup(shipped("train_mnist_fast"), 16, 0.1)
    (planned,) = STAGE.engine.plans_on(STAGE, setup, gpu.limits)
    limit = f"{gpu.shared_bytes:,}"
    said = rf"network 'train_mnist_fast' .* need [\d,]+ bytes, and a block may have {limit}"
    assert re.search(said, planned.declined)
    with pytest.raises(Unsupported, match=said):
        STAGE.engine.operators_on(STAGE, setup, gpu.limits)
    assert STAGE.engine.operators_on(STAGE, setup, A100.limits)


def test_what_one_plan_has_no_room_for_another_trains(limited: Limited) -> None:
    """Its maps alone are larger than what a block of a T4 may have."""
    layers = [{"conv": {"maps": 8, "kernel": 5}}, {"activation": "relu"}, {"dense": 5}]
    network, device = build("wide", (1, 48, 48), 5, layers), emulated(limited, T4)
    with open_engine(tuned.STAGE, network, 4, device) as engine:
        assert engine.choices["chosen_plan"] == "graph"
        refused, said = tuned.STAGE.engine.plans_on(tuned.STAGE, engine.setup, T4.limits)
        assert engine.choices["plans_declined"] == {"persistent": refused.declined}
        assert said.operators == tuple(engine.served)
        validate(engine, *pictures(network, 4))
        five_steps(engine, *pictures(network, 12))


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
@pytest.mark.parametrize(
    ("gpu", "used"),
    [(T4, ["mma.sync"]), (A100, list(NEWER[:4])), (H100, list(NEWER))],
    ids=["t4", "a100", "h100"],
)
def test_instructions_are_those_that_the_gpu_has(gpu: Architecture, used: list[str]) -> None:
    """Not only would others not compile: those that it has are used."""
    source = STAGE.engine.source_on(STAGE, Setup(lenet5(), 16, 0.1), H100.limits)
    code = ptx(source, "tuned", gpu.sm.replace("sm", "compute")).decode()
    assert [name for name in NEWER if re.search(rf"\b{re.escape(name)}\.", code)] == used


@pytest.mark.gpu
@pytest.mark.parametrize("gpu", [T4, A100], ids=["t4", "a100"])
def test_code_for_older_gpus_trains_on_this_one(
    limited: Limited, monkeypatch: pytest.MonkeyPatch, gpu: Architecture
) -> None:
    """What the preprocessor leaves out of it is what such a GPU lacks."""
    own = gpu.sm.replace("sm", "compute")
    monkeypatch.setattr(
        cuda, "compile_cubin", lambda source, name, _, flags=(): ptx(source, name, own, flags)
    )
    network, count = lenet5(), 100
    with open_engine(STAGE, network, count, emulated(limited, gpu)) as engine:
        validate(engine, *pictures(network, count))
        five_steps(engine, *pictures(network, 3 * count))
