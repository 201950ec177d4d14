"""Stages, engines and images that tests of stages share."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class SourceTaken(Exception):
    """What an engine asks its device to compile."""


class Asked:
    """In the place of a device: takes the source that an engine makes for it."""

    def __init__(self, device: Device) -> None:
        self.multiprocessors, self.shared_bytes = device.multiprocessors, device.shared_bytes
        self.kind = device.kind

    def compile(self, *asked: Any) -> NoReturn:
        raise SourceTaken(*asked)


class Builder:
    """Compiles the modules that tests need, several at a time, into the cache on disk.

    A test needs that of its parameter `stage` for its parameter `network`, on fixture `device`.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._pool = ThreadPoolExecutor(usable_cores())
        self._done: dict[tuple[str, str], Future[None]] = {}

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, test: Any) -> "Future[None] | None":
        """Have the module of `test` compiled; None if it needs none."""
        values = test.callspec.params if hasattr(test, "callspec") else {}
        if "device" not in test.fixturenames or not {"stage", "network"} <= values.keys():
            return None
        stage, network = values["stage"], values["network"]
        if stage.runs_on != "gpu":
            return None
        key = stage.name, network.name
        if key not in self._done:
            self._done[key] = self._pool.submit(self._compile, stage, network)
        return self._done[key]

    def wait_for(self, test: Any) -> None:
        if begun := self.begin(test):
            begun.result()

    def _compile(self, stage: Stage, network: Network) -> None:
        try:
            stage.engine(stage, Setup(network, 1, 0.1), Asked(self.device))
        except SourceTaken as taken:
            compile_source(self.device, *taken.args)
        except Unsupported:
            pass  # which the test will see by itself


def compile_source(device: Device, source: str, name: str, kernels: Sequence[str]) -> None:
    if device.kind == "host":
        device.compile(source, name, kernels)
    else:
        from cnnlib.device.cuda import CudaDevice, compile_cubin

        assert isinstance(device, CudaDevice)
        compile_cubin(source, name, device.architecture)
