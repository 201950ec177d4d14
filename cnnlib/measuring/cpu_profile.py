"""Which functions a CPU stage spends its time in, measured by Python's own profiler.

cProfile counts every call, which a sampling profiler does not. It does not see numpy's ufuncs
(matmul, multiply) as functions: their time is counted as the caller's own. It adds 0.5 to 0.7
microseconds to every call: LeNet-5 in stage naive, with 66,000 calls an image, took 1.3 times as
long under it (gemm at batch 64 at most 1.1 times), so functions that are called very often look
slower compared with others than they are. The shares of the layers hardly change: convolutions took
69 % of the time under the profiler and 71 % without it.
"""

import cProfile
import dataclasses
import pstats
import time
from pathlib import Path

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import ImageByImage
from cnnlib.errors import ConfigError
from cnnlib.measuring import schema
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import Run, seed_of
from cnnlib.measuring.schema import Row
from cnnlib.paths import PACKAGE, ROOT
from cnnlib.stages import find_stage
from cnnlib.training.loop import batches, epoch_order, start
from cnnlib.training.target import check_batch, open_engine, open_target, setup_of

SMALLEST = 0.001
"""Share of the time below which a function is left out."""

Timings = dict[tuple[str, int, str], tuple[int, int, float, float, object]]
"""(file, line, function) -> (primitive calls, calls, own seconds, total seconds, callers)."""


def measure_cpu_profile(config: Config, run: Run, dataset: Dataset, out: Path) -> None:
    """Profile training steps of `run` and write the rows of `cpu_profile` to `out`.

    The profile takes about measuring.sample_seconds. The stage computes on one thread, because the
    profiler does not see other processes, and stage 1 on batches of at most
    measuring.budget_images. Raises ConfigError for a stage that does not run on the CPU.
    """
    stage = find_stage(run.stage, "--stage")
    if stage.runs_on != "cpu":
        raise ConfigError(f"stage '{run.stage}' spends its time on a GPU: see the table kernels")
    network = config.network(run.network, run.dataset, "--network")
    check_batch(dataset, run.batch_size)
    size = run.batch_size
    if issubclass(stage.engine, ImageByImage):
        size = min(size, config.measuring.budget_images)
    single = dataclasses.replace(stage, threads=1)
    seed, count = seed_of(config, run.repeat), len(dataset.train_labels)
    profiler = cProfile.Profile()
    setup = setup_of(config, network, dataset, size, seed)
    with (
        open_target(single, config.sweep.device) as target,
        open_engine(single, setup, target, dataset) as engine,
    ):
        start(engine, seed)
        order = epoch_order(count, seed, 1)
        engine.train(order[:size])
        ends = time.perf_counter() + config.measuring.sample_seconds
        for chunk in batches(order, size=size):
            batch = np.ascontiguousarray(chunk.order)
            profiler.enable()
            engine.train(batch)
            profiler.disable()
            if time.perf_counter() >= ends:
                break
        rows = RunRows(run, seed, target.name, target.kind)
    schema.write(out, "cpu_profile", [rows.row(**row) for row in hottest(profiler)])


def hottest(profiler: cProfile.Profile) -> list[Row]:
    """Functions by the time spent in themselves, largest first, without identity."""
    stats: Timings = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    whole = sum(own for _, _, own, _, _ in stats.values())
    found = [
        (own, readable(file, line, name), calls, total)
        for (file, line, name), (_, calls, own, total, _) in stats.items()
        if own >= SMALLEST * whole
    ]
    return [
        {"function": function, "calls": calls, "own_seconds": own, "total_seconds": total}
        for own, function, calls, total in sorted(found, key=lambda each: (-each[0], each[1]))
    ]


def readable(file: str, line: int, name: str) -> str:
    """A function as `conv.py:57 forward`; compiled functions by their name without brackets."""
    if file == "~":
        return name.removeprefix("<").removesuffix(">").removeprefix("built-in method ")
    path = Path(file)
    if path.is_relative_to(PACKAGE):
        return f"{path.relative_to(ROOT)}:{line} {name}"
    if not path.is_absolute():  # generated code, such as the constructor of a named tuple
        return f"{file} {name}"
    return f"{path.parent.name}/{path.name}:{line} {name}"
