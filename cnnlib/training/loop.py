"""The only training loop, its checkpoints, and how an engine is opened for it."""

import hashlib
import json
import math
import time
import warnings
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
from cnnlib.engine.shuffle import Shuffle
from cnnlib.errors import ConfigError, DataError
from cnnlib.files import read_arrays, write_whole
from cnnlib.network import Network
from cnnlib.system.interrupts import Stopped
from cnnlib.system.machine import cpu_description, usable_cores
from cnnlib.system.supervisor import note

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
    images_done: int = 0
    """Images of this epoch already trained on: more than those of its steps where an engine can be
    interrupted within one (Engine.unit).
    """
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
        yield _noted(Place(cpu_description(stage.threads), "cpu"))
        return
    wanted = config.sweep.device
    if stage.runs_on == "either":
        if library_kind(wanted) == "cuda":
            name, bus = gpu_identity()
            yield _noted(Place(name, "cuda", None, bus))
        else:
            yield _noted(Place(cpu_description(None), "cpu"))
        return
    device = open_device(wanted)
    try:
        yield _noted(Place(device.name, device.kind, device, device.pci_bus_id))
    finally:
        device.close()


def library_kind(wanted: str) -> str:
    """Kind of device that a library which finds its own is given for sweep.device: cuda or cpu."""
    return "cuda" if wanted == "cuda" or (wanted == "auto" and gpu_present()) else "cpu"


def _noted(place: Place) -> Place:
    """Note the device, in case the stage ends this process; returns the place."""
    note(device=place.name, device_kind=place.kind)
    return place


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
        warmup=config.training.warmup if config.training.schedule == "one_cycle" else None,
        mean=dataset.mean,
        deviation=dataset.deviation,
        resident_images=config.measuring.resident_images,
        # what is fast as a host build says nothing about anything
        tune=config.measuring.autotune and place.kind == "cuda",
        on=place.kind,
        labels=hashlib.sha256(dataset.train_labels.tobytes()).hexdigest(),
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
    return Shuffle(count, seed, epoch).indices()


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
    stop: Callable[[], int] = lambda: 0,
    notes: Callable[[], str] = str,
) -> Iterator[Epoch]:
    """Train on the `count` images loaded, from the engine's current state; one Epoch each.

    Ends early, after the epoch in question, when the loss is no longer finite. An epoch's clock
    runs from before its order is drawn until its last update is visible to the host. With
    `checkpoint` or `report` an epoch is done in blocks of about a second; in between, `report` is
    called with the state and the steps per epoch, and the state is saved every `seconds_between`
    seconds, off the clock, together with the text that `notes` gives; so it is when an epoch has
    ended and the caller asks for the next. An existing checkpoint is gone on from. Raises Stopped,
    the state saved, after the block in which `stop` begins to tell a signal's number.
    """
    size = engine.setup.batch_size
    steps = count // size
    state = State()
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, engine, count, seed, epochs)
    saved = time.monotonic()
    in_blocks = checkpoint is not None or report is not None
    unit, images = (engine.unit if in_blocks else size), steps * size
    block = unit if in_blocks else images
    while state.epoch <= epochs:
        began = time.perf_counter()
        order = epoch_order(count, seed, state.epoch) if in_blocks else None
        rates = engine.setup.schedule.rates(state.epoch, epochs, steps)
        while state.images_done < images:
            # Blocks are whole units, so that a resumed epoch sees the same batches.
            end = min(state.images_done + block, images)
            if order is None:
                loss = engine.train_epoch(Shuffle(count, seed, state.epoch), rates) * steps
            else:
                part, due = order[state.images_done : end], rates[state.step : end // size]
                loss = engine.train_units(part, due)
            now = time.perf_counter()
            elapsed, began = now - began, now
            state.seconds += elapsed
            state.loss_sum += loss
            state.images_done, state.step = end, end // size
            if not math.isfinite(loss):
                break
            if in_blocks:
                fitting = int(block // unit * BLOCK_SECONDS / max(elapsed, 1e-3)) * unit
                block = max(unit, min(images, fitting, 2 * block))
            if report is not None:
                report(state, steps)
            number = stop()
            late = time.monotonic() - saved > seconds_between
            if checkpoint is not None and (late or number):
                save_checkpoint(checkpoint, engine, count, seed, epochs, state, notes())
                saved = time.monotonic()
            if number:
                raise Stopped(number, checkpoint is not None)
            began = time.perf_counter()
        done = Epoch(
            state.epoch, state.seconds, state.step * size, state.loss_sum / max(state.step, 1)
        )
        state = State(epoch=state.epoch + 1)
        yield done
        if done.diverged:
            return
        if checkpoint is not None:
            save_checkpoint(checkpoint, engine, count, seed, epochs, state, notes())
            saved = time.monotonic()


def accuracy(engine: Engine, images: Bytes, labels: Bytes) -> float:
    """Share of `images` whose most probable class is the label; nan if any logit is not finite."""
    logits = engine.logits(images)
    if not np.isfinite(logits).all():
        return math.nan
    return float(np.mean(logits.argmax(axis=1) == labels))


def _training(engine: Engine, count: int, seed: int, epochs: int) -> dict[str, Any]:
    """All that decides how a training goes on from a given state.

    Images are told apart by their number, mean and deviation.
    """
    setup = engine.setup
    layers = [{layer.kind: layer.model_dump()} for layer in engine.network.layers]
    return {
        "stage": engine.stage.name,
        "network": engine.network.name,
        "layers": json.dumps(layers, sort_keys=True),
        "batch_size": setup.batch_size,
        "learning_rate": setup.learning_rate,
        "momentum": setup.momentum,
        # A cycle ends with its last epoch; a training at one rate may go on for more of them.
        "warmup": math.inf if setup.warmup is None else setup.warmup,
        "epochs": 0 if setup.warmup is None else epochs,
        "mean": setup.mean,
        "deviation": setup.deviation,
        "images": count,
        "seed": seed,
        "labels": setup.labels,
    }


def save_checkpoint(
    path: Path,
    engine: Engine,
    count: int,
    seed: int,
    epochs: int,
    state: State,
    notes: str = "",
) -> None:
    """Parameters, velocity, unfinished step and position, as a whole file, with the caller's notes;
    the old one stays until it is there.
    """
    with write_whole(path) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            parameters=engine.parameters,
            velocity=engine.velocity,
            unfinished=engine.unfinished,
            cores=usable_cores(),
            notes=notes,
            **_training(engine, count, seed, epochs),
            **vars(state),
        )


def load_checkpoint(path: Path, engine: Engine, count: int, seed: int, epochs: int) -> State:
    """Put a checkpoint's parameters and velocity into `engine` and return its position.

    Warns when it was made with another number of cores, by which sums of several cores may round
    otherwise. Raises DataError naming the file when it is damaged or belongs to another training.
    """
    wanted = _training(engine, count, seed, epochs)
    fields = vars(State())
    names = {*wanted, *fields, "parameters", "velocity", "unfinished", "cores"} - {"labels"}
    # Checkpoints of earlier versions say nothing of labels.
    saved = {"labels": wanted["labels"]} | read_arrays(path, names, "checkpoint", ["labels"])
    remedy = "remove it to start again"
    for name, value in wanted.items():
        if not np.array_equal(saved[name], value):
            raise DataError(
                f"checkpoint {path} belongs to another training: {name} differs; {remedy}"
            )
    vectors = [saved["parameters"], saved["velocity"]]
    try:
        state = State(**{name: type(value)(saved[name].item()) for name, value in fields.items()})
        size, unit = engine.setup.batch_size, engine.unit
        sound = (
            state.epoch >= 1
            and 0 <= state.images_done <= count // size * size
            and state.images_done % unit == 0
            and state.step == state.images_done // size
            and all(vector.shape == (engine.network.parameter_count,) for vector in vectors)
            and all(vector.dtype == engine.parameters.dtype for vector in vectors)
        )
        cores = int(saved["cores"].item())
        if sound:
            engine.unfinished = saved["unfinished"]
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise DataError(f"checkpoint {path} is damaged; {remedy}")
    if engine.stage.threads is None and cores != usable_cores():
        warnings.warn(
            f"checkpoint {path} was made with {cores} cores, here are {usable_cores()}: the last "
            "bits may differ from those of an undisturbed training",
            stacklevel=2,
        )
    engine.parameters, engine.velocity = vectors
    return state


def read_notes(path: Path) -> str:
    """What the caller noted in a checkpoint; DataError if it is damaged."""
    notes = read_arrays(path, ["notes"], "checkpoint")["notes"]
    return str(notes.item()) if notes.dtype.kind == "U" and notes.ndim == 0 else ""
