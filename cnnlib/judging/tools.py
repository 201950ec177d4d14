"""NVIDIA's tools around the process of a stage: compute-sanitizer and ncu, where there is a GPU.

Both start the worker (cnnlib/judging/worker.py) as a program and see nothing of the judge.
"""

import csv
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnnlib.datasets import noise
from cnnlib.device.toolkit import find_toolkit
from cnnlib.engine import Setup
from cnnlib.errors import DeviceError
from cnnlib.judging.emulation import trained
from cnnlib.judging.remote import StageFailed, Worker
from cnnlib.network import Network
from cnnlib.training.loop import start
from cnnlib.training.target import open_engine
from cnnlib.validation.verdicts import ValidationFailed

PLACES = (
    "/usr/local/cuda/bin",
    "/opt/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/opt/nvidia/nsight-compute/*",
)
SANITIZER_TOOLS = ("memcheck", "racecheck")
SANITIZER_EXIT = 97
METRICS = {
    "gpu__time_duration.sum": "time (us)",
    "dram__bytes.sum": "device memory (MB)",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of its bandwidth (%)",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "of arithmetic (%)",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy (%)",
    "launch__registers_per_thread": "registers",
}
LAUNCHES = 200
"""Launches of kernels at most that ncu looks at; it repeats each of them several times."""
TO_UNIT = {
    "us": {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3},
    "MB": {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3},
}


class Counter(NamedTuple):
    """The counters of one kernel: means over its launches, in the order of METRICS."""

    kernel: str
    launches: int
    values: list[float]


def find_tool(name: str) -> str | None:
    """The path of one of NVIDIA's tools, on PATH or where the toolkit's installers put it."""
    if found := shutil.which(name):
        return found
    toolkit = find_toolkit()
    if toolkit is not None and (beside := Path(toolkit.nvcc).parent / name).is_file():
        return str(beside)
    for place in PLACES:
        root, _, pattern = place.partition("*")
        folders = (
            sorted(Path(root).glob(f"*{pattern}")) if pattern or "*" in place else [Path(place)]
        )
        for folder in reversed(folders):
            if (folder / name).is_file():
                return str(folder / name)
    return None


def check_compute_sanitizer(
    tool: str, name: str, network: Network, folder: Path, limit: float, device: str = "cuda"
) -> None:
    """Run a few steps under memcheck and racecheck; ValidationFailed with the first report."""
    for check in SANITIZER_TOOLS:
        log = folder / f"compute-sanitizer-{check}.log"
        # Errors that the API returns are exceptions of the stage's library, or nothing.
        under = [tool, "--tool", check, "--report-api-errors", "no", "--target-processes", "all"]
        under += ["--error-exitcode", str(SANITIZER_EXIT)]
        try:
            with Worker(name, device, under=under, log=log, limit=limit) as worker:
                list(trained(worker, network))
                code = worker.finish()
        except StageFailed:
            if report := first_report(log):
                raise ValidationFailed(f"stage '{name}' under {check}: {report}") from None
            raise
        report = first_report(log)
        if code == SANITIZER_EXIT or report:
            raise ValidationFailed(
                f"stage '{name}' under {check}: {report or 'errors without a text'}"
            )


def first_report(log: Path) -> str:
    """The first error that compute-sanitizer has written to a log, in one line; "" for none."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    marked = [line.lstrip("= ") for line in lines if line.startswith("=========")]
    for number, line in enumerate(marked):
        if line.startswith(("Invalid", "Error:", "Uninitialized", "Misaligned")):
            return " ".join([line, *marked[number + 1 : number + 2]]).strip()
    return ""


def count(
    tool: str,
    name: str,
    network: Network,
    batch_size: int,
    log: Path,
    limit: float,
    device: str = "cuda",
) -> list[Counter]:
    """Counters of the kernels of two training steps, by ncu; DeviceError if it gives none."""
    table = log.with_suffix(".csv")
    under = [tool, "--csv", "--log-file", str(table), "--target-processes", "all"]
    under += ["--launch-count", str(LAUNCHES), "--metrics", ",".join(METRICS)]
    images = 2 * batch_size
    data = noise("noise", network.input_shape, network.classes, images)
    setup = Setup(network, batch_size, 0.05, mean=data.mean, deviation=data.deviation)
    with Worker(name, device, under=under, log=log, limit=limit) as worker:
        with open_engine(worker.stage, setup, worker.target, data) as engine:
            start(engine, 1)
            engine.train(np.arange(images))
        worker.finish()
    counters = read_counters(table)
    if not counters:
        text = " ".join(table.read_text(errors="replace").split()) if table.exists() else ""
        raise DeviceError(f"ncu gives no counters: {text[-300:] or 'no output'}")
    return counters


def read_counters(table: Path) -> list[Counter]:
    """The counters in ncu's CSV output, kernels that take longest first."""
    text = table.read_text(errors="replace") if table.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(lines):
        metric, kernel = row.get("Metric Name", ""), row.get("Kernel Name", "")
        if metric in METRICS:
            number = float(row["Metric Value"].replace(",", "") or "nan")
            found[kernel.partition("(")[0]][metric].append(
                number * _scale(metric, row["Metric Unit"])
            )
    counters = [
        Counter(
            kernel,
            max(map(len, values.values())),
            [sum(values[m]) / len(values[m]) if values[m] else float("nan") for m in METRICS],
        )
        for kernel, values in found.items()
    ]
    return sorted(counters, key=lambda counter: -counter.launches * counter.values[0])


def _scale(metric: str, unit: str) -> float:
    wanted = {"gpu__time_duration.sum": "us", "dram__bytes.sum": "MB"}.get(metric)
    return TO_UNIT[wanted].get(unit, 1.0) if wanted else 1.0
