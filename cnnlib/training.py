"""The only training loop, its checkpoints, and how an engine is opened for it."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.device import Device, open_device
from cnnlib.device.cuda import gpu_identity, gpu_present
from cnnlib.engine import Bytes, Engine, Order, Setup, Stage
from cnnlib.errors import ConfigError, DataError
from cnnlib.files import read_arrays, write_whole
from cnnlib.machine import cpu_description, usable_cores
from cnnlib.network import Network

CHECKPOINT_SECONDS = 30.0
BLOCK_SECONDS = 1.0
"""How long a watched training is out of sight."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch (counted from 1) did: wall-clock seconds, images trained on, mean loss."""

    epoch: int
    seconds: float
    images: int
    loss: float

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)


@dataclass
class State:
    """Where a training stands: everything needed to go on bit for bit."""

    epoch: int = 1
    step: int = 0
    """Steps of this epoch already done."""
    seconds: float = 0.0
    loss_sum: float = 0.0
    """Sum of the mean losses of the steps done."""


@dataclass(frozen=True)
class Place:
    """Where a stage runs: the device's name and kind (as in records), and it, if it is no CPU."""

    name: str
    kind: str
    device: Device | None = None
    pci_bus_id: str | None = None
    """Where NVML finds it; None: it is no GPU."""


@contextmanager
def open_place(stage: Stage, config: Config) -> Iterator[Place]:
    """Open what `stage` runs on; DeviceError when what sweep.device asks for is not there."""
    if stage.runs_on == "cpu":
        yield Place(cpu_description(stage.threads), "cpu")
        return
    wanted = config.sweep.device
    if stage.runs_on == "either":
        if wanted == "cuda" or (wanted == "auto" and gpu_present()):
            name, bus = gpu_identity()
            yield Place(name, "cuda", None, bus)
        else:
            yield Place(cpu_description(None), "cpu")
        return
    device = open_device(wanted)
    try:
        yield Place(device.name, device.kind, device, device.pci_bus_id)
    finally:
        device.close()


@contextmanager
def open_engine(
    stage: Stage,
    config: Config,
    network: Network,
    dataset: Dataset,
    batch_size: int,
    place: Place,
) -> Iterator[Engine]:
    """The engine with the training set loaded and threads limited; no parameters are set yet.

    Raises ConfigError for a batch larger than the data set, DoesNotFit for a device too small.
    """
    check_batch(dataset, batch_size)
    setup = Setup(
        network=network,
        batch_size=batch_size,
        learning_rate=config.training.learning_rate,
        momentum=config.training.momentum,
        mean=dataset.mean,
        deviation=dataset.deviation,
        resident_images=config.measuring.resident_images,
        on=place.kind,
    )
    # Said even when all cores are meant: a caller such as Snakemake sets OMP_NUM_THREADS.
    threads = stage.threads or usable_cores()
    with threadpool_limits(threads), stage.engine(stage, setup, place.device) as engine:
        engine.load(dataset.train_images, dataset.train_labels)
        yield engine


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


def epoch_order(count: int, seed: int, epoch: int) -> Order:
    """The order in which epoch `epoch` visits `count` images: the same in every stage."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def start(engine: Engine, seed: int) -> None:
    """Initial weights of `seed`, no momentum."""
    engine.parameters = engine.network.initial_parameters(seed)
    engine.velocity = np.zeros(engine.network.parameter_count, np.float32)


def train_epochs(
    engine: Engine,
    count: int,
    epochs: int,
    seed: int,
    *,
    checkpoint: Path | None = None,
    report: Callable[[State, int], None] | None = None,
    seconds_between: float = CHECKPOINT_SECONDS,
) -> Iterator[Epoch]:
    """Train on the `count` images loaded, from the engine's current state; one Epoch each.

    Ends early, after the epoch in question, when the loss is no longer finite. An epoch's clock
    runs from before its order is drawn until its last update is visible to the host. With
    `checkpoint` or `report` an epoch is done in blocks of about a second; in between, `report` is
    called with the state and the steps per epoch, and the state is saved every `seconds_between`
    seconds (and at each epoch's end), off the clock. An existing checkpoint is gone on from.
    """
    size = engine.setup.batch_size
    steps = count // size
    state = State()
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, engine, count, seed)
    saved = time.monotonic()
    block = steps if checkpoint is None and report is None else 1
    while state.epoch <= epochs:
        began = time.perf_counter()
        order = epoch_order(count, seed, state.epoch)
        while state.step < steps:
            # Blocks end at fixed multiples, so that a resumed epoch sees the same batches.
            end = min(state.step + block, steps)
            loss = engine.train(order[state.step * size : end * size])
            now = time.perf_counter()
            elapsed, began = now - began, now
            state.seconds += elapsed
            state.loss_sum += loss * (end - state.step)
            state.step = end
            if not math.isfinite(loss):
                break
            if block < steps:
                fitting = int(block * BLOCK_SECONDS / max(elapsed, 1e-3))
                block = max(1, min(steps, fitting, 2 * block))
            if report is not None:
                report(state, steps)
            if checkpoint is not None and time.monotonic() - saved > seconds_between:
                save_checkpoint(checkpoint, engine, count, seed, state)
                saved = time.monotonic()
            began = time.perf_counter()
        done = Epoch(
            state.epoch, state.seconds, state.step * size, state.loss_sum / max(state.step, 1)
        )
        state = State(epoch=state.epoch + 1)
        if checkpoint is not None and not done.diverged:
            save_checkpoint(checkpoint, engine, count, seed, state)
            saved = time.monotonic()
        yield done
        if done.diverged:
            return


def accuracy(engine: Engine, images: Bytes, labels: Bytes) -> float:
    """Share of `images` whose most probable class is the label; nan if any logit is not finite."""
    logits = engine.logits(images)
    if not np.isfinite(logits).all():
        return math.nan
    return float(np.mean(logits.argmax(axis=1) == labels))


def _training(engine: Engine, count: int, seed: int) -> dict[str, Any]:
    """All that decides how a training goes on from a given state, but for the images themselves."""
    setup = engine.setup
    layers = [{layer.kind: layer.model_dump()} for layer in engine.network.layers]
    return {
        "stage": engine.stage.name,
        "network": engine.network.name,
        "layers": json.dumps(layers, sort_keys=True),
        "batch_size": setup.batch_size,
        "learning_rate": setup.learning_rate,
        "momentum": setup.momentum,
        "mean": setup.mean,
        "deviation": setup.deviation,
        "images": count,
        "seed": seed,
    }


def save_checkpoint(path: Path, engine: Engine, count: int, seed: int, state: State) -> None:
    """Parameters, velocity and position, as a whole file; the old one stays until it is there."""
    with write_whole(path) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            parameters=engine.parameters,
            velocity=engine.velocity,
            **_training(engine, count, seed),
            **vars(state),
        )


def load_checkpoint(path: Path, engine: Engine, count: int, seed: int) -> State:
    """Put a checkpoint's parameters and velocity into `engine` and return its position.

    Raises DataError naming the file when it is damaged or belongs to another training.
    """
    wanted = _training(engine, count, seed)
    fields = vars(State())
    saved = read_arrays(path, [*wanted, *fields, "parameters", "velocity"], "checkpoint")
    remedy = "remove it to start again"
    for name, value in wanted.items():
        if not np.array_equal(saved[name], value):
            raise DataError(
                f"checkpoint {path} belongs to another training: {name} differs; {remedy}"
            )
    vectors = [saved["parameters"], saved["velocity"]]
    try:
        state = State(**{name: type(value)(saved[name].item()) for name, value in fields.items()})
        sound = (
            state.epoch >= 1
            and 0 <= state.step <= count // engine.setup.batch_size
            and all(vector.shape == (engine.network.parameter_count,) for vector in vectors)
            and all(vector.dtype == engine.parameters.dtype for vector in vectors)
        )
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise DataError(f"checkpoint {path} is damaged; {remedy}")
    engine.parameters, engine.velocity = vectors
    return state
