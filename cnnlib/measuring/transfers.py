"""The cost of keeping only a part of the images on the GPU: one run at many sizes of a load."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import Order
from cnnlib.engine.device_engine import DeviceEngine
from cnnlib.engine.upload import LoadTimes
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported
from cnnlib.measuring import schema
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import Run, seed_of
from cnnlib.measuring.schema import Row
from cnnlib.stages import find_stage
from cnnlib.training.loop import epoch_order, start
from cnnlib.training.target import check_batch, open_engine, open_target, setup_of

EPOCHS = 3
"""Epochs timed at each size, after one that is not timed."""


def loads(batch_size: int, images: int) -> list[int]:
    """Images resident per load: one batch, then four times as many each time, up to all images."""
    sizes = [batch_size]
    while sizes[-1] * 4 < images:
        sizes.append(sizes[-1] * 4)
    whole = images // batch_size * batch_size
    return [*sizes, whole] if whole > sizes[-1] else sizes


def images_in_time(config: Config, engine: DeviceEngine, order: Order) -> int:
    """Number of images to train on at each size of a load.

    As in runs, what would take longer than budget_seconds is timed for sample_seconds at each size.
    """
    size = engine.setup.batch_size
    engine.train(order[:size])
    began = time.perf_counter()
    engine.train(order[:size])
    per_image = (time.perf_counter() - began) / size
    epochs = len(loads(size, len(order))) * (EPOCHS + 1)
    if epochs * per_image * len(order) <= config.measuring.budget_seconds:
        return len(order)
    fitting = int(config.measuring.sample_seconds / (EPOCHS + 1) / per_image)
    return min(len(order), max(size, fitting // size * size))


def measure_transfers(config: Config, run: Run, dataset: Dataset, out: Path) -> None:
    """Time epochs of `run` at each size of load and write the rows of `transfers` to `out`.

    Where all images would take too long, fewer are used. A stage that cannot run here gives one row
    with the reason, as in cnnlib.measuring.run. Raises ConfigError for a stage that does not run on
    a GPU: it loads nothing; Unsupported for an author's engine that loads images in its own way.
    """
    stage = find_stage(run.stage, "--stage")
    if not issubclass(stage.engine, DeviceEngine):
        why = f"stage '{run.stage}' loads nothing onto a GPU"
        if stage.runs_on == "cuda":
            raise Unsupported(f"{why} in a way that could be timed: its engine is no DeviceEngine")
        raise ConfigError(why)
    network = config.network(run.network, run.dataset, "--network")
    check_batch(dataset, run.batch_size)
    setup = setup_of(config, network, dataset, run.batch_size, seed_of(config, run.repeat))
    seed, count = seed_of(config, run.repeat), len(dataset.train_labels)
    found: list[Row] = []

    @contextmanager
    def opened(resident: int) -> Iterator[DeviceEngine]:
        sized = dataclasses.replace(setup, resident_images=resident)
        with open_engine(stage, sized, target, dataset) as engine:
            start(engine, seed)
            yield cast(DeviceEngine, engine)  # see above: stage.engine is a subclass of it

    with open_target(stage, config.sweep.device) as target:
        rows = RunRows(run, seed, target.name, target.kind)
        try:
            with opened(run.batch_size) as engine:
                used = images_in_time(config, engine, epoch_order(count, seed, 0))
            for resident in loads(run.batch_size, used):
                with opened(resident) as engine:
                    for epoch in range(EPOCHS + 1):
                        times = engine.train_timed(epoch_order(count, seed, epoch)[:used])
                        if epoch:
                            images = used // run.batch_size * run.batch_size
                            found.append(rows.row(**row(resident, epoch, images, times)))
        except (DoesNotFit, MemoryError, Unsupported) as error:
            status = "unavailable" if isinstance(error, Unsupported) else "does_not_fit"
            why = str(error) or "out of memory"
            found = [rows.blank("transfers", status, why, epoch=1)]
    schema.write(out, "transfers", found)


def row(resident: int, epoch: int, images: int, times: LoadTimes) -> Row:
    """A row of the table without identity."""
    return {
        "resident_images": resident,
        "epoch": epoch,
        "images": images,
        "epoch_seconds": times.total,
        "gather_seconds": times.gather,
        "upload_seconds": times.upload,
        "kernel_seconds": times.kernels,
    }
