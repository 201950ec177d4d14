"""What it costs to keep only some of the images on the GPU: one run at many sizes of load."""

import dataclasses
import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import Engine, Order
from cnnlib.engine.gpu import DeviceEngine
from cnnlib.engine.upload import LoadTimes
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported
from cnnlib.measuring import schema
from cnnlib.measuring.runs import Run, seed_of
from cnnlib.stages import find_stage
from cnnlib.training.loop import epoch_order, start
from cnnlib.training.target import Target, check_batch, open_engine, open_target, setup_of

EPOCHS = 3
"""Epochs timed at each size, after one that is not."""


def loads(batch_size: int, images: int) -> list[int]:
    """Images resident per load: one batch, then four times as many each time, up to all."""
    sizes = [batch_size]
    while sizes[-1] * 4 < images:
        sizes.append(sizes[-1] * 4)
    whole = images // batch_size * batch_size
    return [*sizes, whole] if whole > sizes[-1] else sizes


def images_within(config: Config, engine: DeviceEngine, order: Order) -> int:
    """Images to train on at each size of load: all, or what a part of the time allows.

    As for runs: what would take longer than budget_seconds is timed for sample_seconds, each load.
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

    On fewer images than there are, where they would take too long. What the stage cannot do here
    gives one row that says so, as in cnnlib.measuring.run. Raises ConfigError for a stage that does
    not run on a GPU: it loads nothing.
    """
    stage = find_stage(run.stage, "--stage")
    if not issubclass(stage.engine, DeviceEngine):
        raise ConfigError(f"stage '{run.stage}' loads nothing onto a GPU")
    network = config.network(run.network, run.dataset, "--network")
    check_batch(dataset, run.batch_size)
    setup = setup_of(config, network, dataset, run.batch_size)
    seed, count = seed_of(config, run.repeat), len(dataset.train_labels)
    rows = []

    def opened(resident: int) -> AbstractContextManager[Engine]:
        sized = dataclasses.replace(setup, resident_images=resident)
        return open_engine(stage, sized, target, dataset)

    with open_target(stage, config.sweep.device) as target:
        try:
            with opened(run.batch_size) as engine:
                assert isinstance(engine, DeviceEngine)
                start(engine, seed)
                used = images_within(config, engine, epoch_order(count, seed, 0))
            for resident in loads(run.batch_size, used):
                with opened(resident) as engine:
                    assert isinstance(engine, DeviceEngine)
                    start(engine, seed)
                    for epoch in range(EPOCHS + 1):
                        times = engine.train_timed(epoch_order(count, seed, epoch)[:used])
                        if epoch:
                            rows.append(row(run, seed, target, resident, epoch, used, times))
        except (DoesNotFit, MemoryError, Unsupported) as error:
            status = "unavailable" if isinstance(error, Unsupported) else "does_not_fit"
            why = {"status": status, "reason": str(error) or "out of memory"}
            rows = [row(run, seed, target, 0, 1, 0, LoadTimes(*[math.nan] * 4)) | why]
    schema.write(out, "transfers", rows)


def row(
    run: Run, seed: int, target: Target, resident: int, epoch: int, used: int, times: LoadTimes
) -> dict[str, Any]:
    """One row of the table."""
    return {
        "dataset": run.dataset,
        "network": run.network,
        "stage": run.stage,
        "device": target.name,
        "batch_size": run.batch_size,
        "seed": seed,
        "repeat": run.repeat,
        "resident_images": resident,
        "epoch": epoch,
        "images": used // run.batch_size * run.batch_size,
        "epoch_seconds": times.total,
        "gather_seconds": times.gather,
        "upload_seconds": times.upload,
        "kernel_seconds": times.kernels,
        "device_kind": target.kind,
        "status": "ok",
        "validated": False,
        "extrapolated": False,
    }
