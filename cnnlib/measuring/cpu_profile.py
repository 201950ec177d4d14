"""Which functions a CPU stage spends its time in, by Python's own profiler.

cProfile counts every call, which a sampling profiler does not. numpy's ufuncs (matmul, multiply)
are no functions to it: their time is the caller's own. It adds 0.5 to 0.7 microseconds to every
call: LeNet-5 in naive, 66,000 calls an image, took 1.3 times as long with it (gemm at batch 64
at most 1.1 times), and functions that are called very often look slower beside the others than they
are. Between layers that moves little: convolutions had 69 % of the time with it, 71 % without.
"""

import cProfile
import dataclasses
import pstats
import time
from pathlib import Path
from typing import Any

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import ImageByImage
from cnnlib.errors import ConfigError
from cnnlib.measuring import schema
from cnnlib.measuring.runs import Run, seed_of
from cnnlib.paths import ROOT
from cnnlib.stages import find_stage
from cnnlib.training.loop import epoch_order, start
from cnnlib.training.target import check_batch, open_engine, open_target, setup_of

SMALLEST = 0.001
"""Share of the time below which a function is left out."""


def measure_functions(config: Config, run: Run, dataset: Dataset, out: Path) -> None:
    """Profile training steps of `run` and write the rows of `cpu_profile` to `out`.

    On one thread: what other processes do, the profiler does not see. For about
    measuring.sample_seconds; stage 1 on batches of measuring.budget_images at the most. Raises
    ConfigError for a stage that does not run on the CPU.
    """
    stage = find_stage(run.stage, "--stage")
    if stage.runs_on != "cpu":
        raise ConfigError(f"stage '{run.stage}' spends its time on a GPU: see the table kernels")
    network = config.network(run.network, run.dataset, "--network")
    check_batch(dataset, run.batch_size)
    size = run.batch_size
    if issubclass(stage.engine, ImageByImage):
        size = min(size, config.measuring.budget_images)
    alone = dataclasses.replace(stage, threads=1)
    setup = setup_of(config, network, dataset, size)
    seed, count = seed_of(config, run.repeat), len(dataset.train_labels)
    profiler = cProfile.Profile()
    with (
        open_target(alone, config.sweep.device) as target,
        open_engine(alone, setup, target, dataset) as engine,
    ):
        start(engine, seed)
        order = epoch_order(count, seed, 1)
        engine.train(order[:size])
        ends, first = time.perf_counter() + config.measuring.sample_seconds, 0
        while not first or (time.perf_counter() < ends and first + size <= count):
            batch = np.ascontiguousarray(order[first : first + size])
            profiler.enable()
            engine.train(batch)
            profiler.disable()
            first += size
        device = target.name
    identity = {
        "dataset": run.dataset, "network": run.network, "stage": run.stage, "device": device,
        "batch_size": run.batch_size, "seed": seed, "repeat": run.repeat,
    }  # fmt: skip
    standing = {
        "device_kind": "cpu", "status": "ok", "validated": False, "extrapolated": False,
    }  # fmt: skip
    schema.write(out, "cpu_profile", [identity | row | standing for row in hottest(profiler)])


def hottest(profiler: cProfile.Profile) -> list[dict[str, Any]]:
    """Functions by the time spent in themselves, largest first."""
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = [
        {
            "function": readable(file, line, name),
            "calls": calls,
            "own_seconds": own,
            "total_seconds": total,
        }
        for (file, line, name), (_, calls, own, total, _) in stats.items()
    ]
    whole = sum(row["own_seconds"] for row in rows)
    rows = [row for row in rows if row["own_seconds"] >= SMALLEST * whole]
    return sorted(rows, key=lambda row: (-row["own_seconds"], row["function"]))


def readable(file: str, line: int, name: str) -> str:
    """`conv.py:57 forward`; the names of compiled functions without Python's brackets."""
    if file == "~":
        return name.removeprefix("<").removesuffix(">").removeprefix("built-in method ")
    path = Path(file)
    if path.is_relative_to(ROOT):
        return f"{path.relative_to(ROOT)}:{line} {name}"
    return f"{path.parent.name}/{path.name}:{line} {name}"
