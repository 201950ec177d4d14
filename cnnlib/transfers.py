"""What it costs to keep only some of the images on the GPU: one run at many sizes of load."""

from pathlib import Path

from cnnlib import records
from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine.gpu import GpuEngine
from cnnlib.errors import ConfigError
from cnnlib.experiment import Run, seed_of
from cnnlib.stages import find_stage
from cnnlib.training import check_batch, epoch_order, open_engine, open_place, start

EPOCHS = 3
"""Epochs timed at each size, after one that is not."""


def loads(batch_size: int, images: int) -> list[int]:
    """Images resident per load: one batch, then four times as many each time, up to all."""
    sizes = [batch_size]
    while sizes[-1] * 4 < images:
        sizes.append(sizes[-1] * 4)
    whole = images // batch_size * batch_size
    return [*sizes, whole] if whole > sizes[-1] else sizes


def measure_transfers(config: Config, run: Run, dataset: Dataset, out: Path) -> None:
    """Time epochs of `run` at each size of load and write the rows of `transfers` to `out`.

    Raises ConfigError for a stage that does not run on a GPU: it loads nothing.
    """
    stage = find_stage(run.stage, "--stage")
    if not issubclass(stage.engine, GpuEngine):
        raise ConfigError(f"stage '{run.stage}' loads nothing onto a GPU")
    network = config.network(run.network, run.dataset, "--network")
    check_batch(dataset, run.batch_size)
    seed, count = seed_of(config, run.repeat), len(dataset.train_labels)
    rows = []
    for resident in loads(run.batch_size, count):
        sized = config.model_copy(
            update={"measuring": config.measuring.model_copy(update={"resident_images": resident})}
        )
        with (
            open_place(stage, sized) as place,
            open_engine(stage, sized, network, dataset, run.batch_size, place) as engine,
        ):
            assert isinstance(engine, GpuEngine)
            start(engine, seed)
            for epoch in range(EPOCHS + 1):
                times = engine.train_timed(epoch_order(count, seed, epoch))
                if epoch == 0:
                    continue
                rows.append(
                    {
                        "dataset": run.dataset,
                        "network": run.network,
                        "stage": run.stage,
                        "device": place.name,
                        "batch_size": run.batch_size,
                        "seed": seed,
                        "repeat": run.repeat,
                        "resident_images": resident,
                        "epoch": epoch,
                        "images": count // run.batch_size * run.batch_size,
                        "epoch_seconds": times.total,
                        "gather_seconds": times.gather,
                        "upload_seconds": times.upload,
                        "kernel_seconds": times.kernels,
                        "device_kind": place.kind,
                        "status": "ok",
                        "validated": False,
                        "extrapolated": False,
                    }
                )
    records.write(out, "transfers", rows)
