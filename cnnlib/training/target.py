"""What a stage runs on, and how an engine is opened there."""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from cnnlib.config import Config, Training
from cnnlib.datasets import Dataset
from cnnlib.device import Device, open_device
from cnnlib.device.driver import gpu_identity, gpu_present
from cnnlib.engine import Engine, Setup, Stage
from cnnlib.errors import ConfigError
from cnnlib.levels import Level
from cnnlib.network import Network
from cnnlib.system.machine import cpu_description, usable_cores
from cnnlib.system.supervisor import note


@dataclass(frozen=True)
class Target:
    """The processor that trains: its name and kind as in records, and its open device, if any."""

    name: str
    kind: str
    device: Device | None = None
    """Open for a stage with kernels of its own; None on a CPU and for a peer's library."""
    pci_bus_id: str | None = None
    """The address by which NVML finds a GPU; None for anything else."""


@contextmanager
def open_target(stage: Stage, device: str = "auto") -> Iterator[Target]:
    """Open what `stage` runs on; `device` is the choice of sweep.device.

    Raises DeviceError when that device is not there.
    """
    if stage.runs_on == "cpu":
        yield _noted(Target(cpu_description(stage.threads), "cpu"))
    elif stage.runs_on == "any":
        if library_kind(device) == "cuda":
            name, bus = gpu_identity()
            yield _noted(Target(name, "cuda", None, bus))
        else:
            yield _noted(Target(cpu_description(None), "cpu"))
    else:
        opened = open_device(device)
        try:
            yield _noted(Target(opened.name, opened.kind, opened, opened.pci_bus_id))
        finally:
            opened.close()


def library_kind(device: str) -> str:
    """The kind of device, cuda or cpu, on which a peer's library runs for a given sweep.device."""
    return "cuda" if device == "cuda" or (device == "auto" and gpu_present()) else "cpu"


def _noted(target: Target) -> Target:
    """Note the device for the supervisor, in case the stage ends this process."""
    note(device=target.name, device_kind=target.kind)
    return target


def setup_of(
    config: Config, network: Network, dataset: Dataset, batch_size: int, seed: int | None = None
) -> Setup:
    """What the config asks for, for training `network` on `dataset`; `seed` is that of a repeat."""
    setup = setup_for(config.training, network, batch_size, (dataset.mean, dataset.deviation))
    return dataclasses.replace(
        setup,
        resident_images=config.measuring.resident_images,
        tune=config.measuring.autotune,
        seed=setup.seed if seed is None else seed,
        labels=hashlib.sha256(dataset.train_labels.tobytes()).hexdigest(),
    )


def setup_for(
    training: Training, network: Network, batch_size: int, normalisation: tuple[Level, Level]
) -> Setup:
    """What a section `training` asks for; `normalisation` is the images' mean and deviation."""
    mean, deviation = normalisation
    return Setup(
        network=network,
        batch_size=batch_size,
        learning_rate=training.learning_rate,
        momentum=training.momentum,
        warmup=training.warmup if training.schedule == "one_cycle" else None,
        mean=mean,
        deviation=deviation,
        loss=training.loss,
        weight_decay=training.weight_decay,
        initial_weights=training.initial_weights,
        seed=training.seed,
    )


@contextmanager
def open_engine(
    stage: Stage, setup: Setup, target: Target, dataset: Dataset | None = None
) -> Iterator[Engine]:
    """The engine on `target` with its threads limited; no parameters are set yet.

    The training images of `dataset`, if given, are loaded. Raises ConfigError for a batch larger
    than the data set, DoesNotFit for a device too small.
    """
    if dataset is not None:
        check_batch(dataset, setup.batch_size)
    # Set even when all cores are meant: a caller such as Snakemake sets OMP_NUM_THREADS.
    with threadpool_limits(threads_of(stage)), engine_on(target, stage, setup) as engine:
        if dataset is not None:
            engine.load(dataset.train_images, dataset.train_labels)
        yield engine


def threads_of(stage: Stage) -> int:
    """The CPU threads that the stage may use."""
    return stage.threads or usable_cores()


def engine_on(target: Target, stage: Stage, setup: Setup) -> Engine:
    """An engine of the stage on `target`, which the caller closes; threads are not limited."""
    return stage.engine(stage, _setup_on(target, setup), target.device)


def check_supported(target: Target, stage: Stage, setup: Setup) -> None:
    """Raise Unsupported where an engine of the stage on `target` would; none is made."""
    stage.engine.operators_on(stage, _setup_on(target, setup), target.device)


def _setup_on(target: Target, setup: Setup) -> Setup:
    # What is fastest when kernels are emulated says nothing about a GPU.
    tune = setup.tune and target.kind == "cuda"
    return dataclasses.replace(setup, device_kind=target.kind, tune=tune)


def check_batch(dataset: Dataset, batch_size: int) -> None:
    """ConfigError unless the training images make at least one batch."""
    count = len(dataset.train_labels)
    if batch_size < 1:
        raise ConfigError(f"a batch has at least 1 image, not {batch_size}")
    if batch_size > count:
        raise ConfigError(
            f"batch size {batch_size} is larger than data set '{dataset.name}' "
            f"({count} training images)"
        )
