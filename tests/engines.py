"""Stages, engines and images that tests of stages share."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np

from cnnlib.device import Device
from cnnlib.engine import Bytes, Engine, Setup, Stage
from cnnlib.errors import Unsupported
from cnnlib.machine import usable_cores
from cnnlib.network import Network
from cnnlib.stages import LADDER, VARIANTS

GPU_STAGES = [stage for stage in (*LADDER, *VARIANTS) if stage.runs_on == "gpu"]


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


class SourceTaken(Exception):
    """What an engine asks its device to compile."""


class Asked:
    """In the place of a device: takes the source that an engine makes for it."""

    def __init__(self, device: Device) -> None:
        self.multiprocessors, self.shared_bytes = device.multiprocessors, device.shared_bytes

    def compile(self, *asked: Any) -> NoReturn:
        raise SourceTaken(*asked)


def compile_for(device: Device, pairs: Iterable[tuple[Stage, Network]]) -> None:
    """Compile the modules of these engines, several at a time, into the cache on disk."""

    def compile_one(pair: tuple[Stage, Network]) -> None:
        stage, network = pair
        try:
            stage.engine(stage, Setup(network, 1, 0.1), Asked(device))
        except SourceTaken as taken:
            compile_source(device, *taken.args)
        except Unsupported:
            pass

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(compile_one, pairs))


def compile_source(device: Device, source: str, name: str, kernels: Sequence[str]) -> None:
    if device.kind == "host":
        device.compile(source, name, kernels)
    else:
        from cnnlib.device.cuda import CudaDevice, compile_cubin

        assert isinstance(device, CudaDevice)
        compile_cubin(source, name, device.architecture)
