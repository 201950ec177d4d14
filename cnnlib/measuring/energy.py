"""The energy of training: a GPU's own counter, read while it trains without a pause."""

import math
import time

import numpy as np
from numpy.typing import NDArray

from cnnlib.engine import Engine
from cnnlib.engine.shuffle import Shuffle
from cnnlib.measuring.schema import Row
from cnnlib.measuring.telemetry import TelemetryRecord
from cnnlib.training.loop import epoch_order

PHASE = "sustain"
"""The phase of a run in which energy is measured."""


def sustain(engine: Engine, count: int, seed: int, seconds: float) -> int:
    """Train on the `count` images loaded, epoch after epoch, for `seconds`; images trained on.

    Where an epoch takes longer than that, it is trained in parts of about a tenth of the time. The
    order is drawn each time, as it is in an epoch that is measured.
    """
    size = engine.setup.batch_size
    steps = count // size
    ends = time.perf_counter() + seconds
    images, part, epoch = 0, 1, 0
    while (began := time.perf_counter()) < ends:
        if part == steps:
            engine.train_epoch(Shuffle(count, seed, epoch))
        else:
            engine.train(epoch_order(count, seed, epoch)[: part * size])
        images, epoch = images + part * size, epoch + 1
        if time.perf_counter() - began < seconds / 10:
            part = min(steps, 2 * part)
    return images


def energy_row(telemetry: TelemetryRecord, images: int) -> Row:
    """The row of the table `energy`, without identity: PHASE trained on `images`."""
    row: Row = {
        "images": images,
        "window_seconds": 0.0,
        "energy_joules": math.nan,
        "idle_watts": math.nan,
        "status": "unavailable",
    }
    spans = telemetry.spans(PHASE)
    times = telemetry.column("at")
    if not spans or not len(times):
        return row
    began, ended = spans[0]
    joules = window_energy(times, telemetry.column("energy_joules"), began, ended)
    row |= {"window_seconds": ended - began, "energy_joules": joules}
    watts = telemetry.column("power_watts")
    watts = watts[np.isfinite(watts)]
    if len(watts):
        row["idle_watts"] = float(watts[0])  # the first reading precedes all computing
    if math.isfinite(joules):
        row["status"] = "ok"
    return row


def window_energy(
    times: NDArray[np.float64], counter: NDArray[np.float64], began: float, ended: float
) -> float:
    """Joules between `began` and `ended`, from a counter that moves in jumps.

    The counter (joules, read at `times`) is updated some ten to fifty times a second, so its
    difference between the ends of a short window could miss or double a jump. From the first to
    the last jump inside the window it is exact; that difference is scaled to the window. nan with
    fewer than three jumps.
    """
    inside = (times >= began) & (times <= ended) & np.isfinite(counter)
    at, joules = times[inside], counter[inside]
    jumps = np.flatnonzero(np.diff(joules) > 0) + 1
    if len(jumps) < 3:
        return math.nan
    first, last = jumps[0], jumps[-1]
    rate = (joules[last] - joules[first]) / (at[last] - at[first])
    return float(rate * (ended - began))
