"""The machine's limit of arithmetic, and how much of a network's epoch it is."""

import math

import pandas as pd

from workflow.plotting import frames

CEILINGS = {"cuda": "peak_fp32", "cpu": "blas_all"}
"""The probe of the arithmetic in float32 that a kind of device can do at most."""
WORDS = {
    "peak_fp32": "float32 on the GPU",
    "blas_all": "float32 on all cores",
    "blas_one": "float32 on one core",
}


def probe_of(kind: str, device: str) -> str:
    """The probe that says how much arithmetic a stage on this device can do; "" if none does."""
    if kind == "cpu" and device.endswith(", 1 thread"):
        return "blas_one"
    return CEILINGS.get(kind, "")


def peaks(probes: pd.DataFrame) -> dict[str, float]:
    """Floating-point operations a second by probe: the medians of what was measured."""
    good = probes[(probes["status"] == "ok") & probes["probe"].isin(WORDS)]
    return {
        str(probe): 1e12 * rows["rate"].median() for probe, rows in frames.groups(good, "probe")
    }


def image_flops(kernels: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Floating-point operations by data set and network that training on one image needs.

    Forward and backward through all layers, without the update. Kernels of one part all have the
    count of the whole part. A stage may be profiled on fewer images than a batch has: the largest
    count is that of a batch.
    """
    parts = kernels[kernels["part"].isin(["forward", "backward"]) & (kernels["flops"] > 0)]
    found: dict[tuple[str, str], float] = {}
    runs = ["dataset", "network", "stage", "batch_size", "repeat"]
    of_parts = parts.groupby([*runs, "layers", "part"], sort=False)["flops"].first()
    for row in frames.rows(of_parts.groupby(runs, sort=False).sum().reset_index()):
        place = row.dataset, row.network
        found[place] = max(found.get(place, 0.0), row.flops / row.batch_size)
    return found


def share(flops: float, seconds: float, peak: float) -> float:
    """The part of `peak` that `flops` in `seconds` are; nan where one is not known."""
    known = seconds > 0 and peak > 0 and math.isfinite(flops)
    return flops / seconds / peak if known else math.nan
