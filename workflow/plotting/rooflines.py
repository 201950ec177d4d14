"""The marks and lines of rooflines: what a training reaches, and what the machine can do."""

import numpy as np
import pandas as pd

from workflow.plotting import frames, limits, timings

CEILINGS = {
    "cuda": (("copy_device", "memory:"), (("peak_fp32", "float32"), ("peak_tf32", "TF32"))),
    "cpu": (("", ""), (("blas_all", "BLAS, all cores"),)),
    "one core": (("copy_cpu", "memory, one thread:"), (("blas_one", "BLAS, one core"),)),
}
"""The probes of a panel's limits, and their names: copies, then arithmetic."""
PART = ["layers", "part"]


def of_parts(kernels: pd.DataFrame) -> pd.DataFrame:
    """Seconds, flops and bytes of every part: medians over the repeats."""
    kernels = kernels.assign(seconds=kernels["launches"] * kernels["kernel_seconds"])
    keys = ["stage", "device", "device_kind", *PART]
    runs = kernels.groupby([*keys, "repeat"], sort=False).agg(
        seconds=("seconds", "sum"), flops=("flops", "first"), bytes=("bytes", "first")
    )
    marks = runs.groupby(keys, sort=False).median().reset_index()
    marks["rate"], marks["intensity"] = (
        marks["flops"] / marks["seconds"],
        marks["flops"] / marks["bytes"],
    )
    marks["share"] = marks["seconds"] / marks.groupby("stage")["seconds"].transform("sum")
    return marks.assign(panel=marks["device_kind"])


def of_steps(kernels: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """The same for whole steps of stages on a CPU, by their time in whole epochs."""
    if not len(kernels):
        return kernels
    keys = ["stage", "device", "device_kind"]
    of_part = kernels.groupby([*keys, *PART, "repeat"], sort=False)[["flops", "bytes"]].first()
    steps = of_part.groupby([*keys, "repeat"], sort=False).sum().groupby(keys, sort=False).median()
    intensity = steps["flops"] / steps["bytes"]
    good = epochs[(epochs["status"] == "ok") & epochs["epoch_seconds"].notna()]
    size = kernels["batch_size"].iloc[0]
    flops, images = limits.image_flops(kernels), timings.epoch_images(good)
    times = timings.repeats(good, ["dataset", *keys, "batch_size"])
    found = []
    for row in frames.rows(intensity.rename("value").reset_index()):
        stage, device, kind = row.stage, row.device, row.device_kind
        own = times.get((kernels["dataset"].iloc[0], stage, device, kind, size), [])
        if not own:
            continue
        count = images(kernels["dataset"].iloc[0], size)
        an_image = float(np.median(np.concatenate(own))) / count
        one = limits.probe_of(kind, device) == "blas_one"
        found.append(
            dict(zip(keys, (stage, device, kind), strict=True))
            | {"layers": "", "part": "a whole step", "intensity": row.value, "share": 0.5}
            | {"rate": next(iter(flops.values())) / an_image, "seconds": an_image * size}
            | {"panel": "one core" if one else "cpu"}
        )
    marks = pd.DataFrame(found)
    return marks[marks["rate"].notna()] if len(marks) else marks


def ceilings(probes: pd.DataFrame, kind: str) -> tuple[list[tuple[str, float]], float, str]:
    """[(name, FLOP/s)], bytes/s and its name, as far as they were measured on such a device."""
    on = "cpu" if kind == "one core" else kind
    own = probes[(probes["device_kind"] == on) & (probes["status"] == "ok")]
    (copy, name), peaks = CEILINGS.get(kind, (("", ""), ()))
    largest = own[own["probe"] == copy]
    largest = largest[largest["size_bytes"] == largest["size_bytes"].max()]
    bandwidth = largest["rate"].median() * 1e9
    found = [(text, own.loc[own["probe"] == peak, "rate"].median() * 1e12) for peak, text in peaks]
    return [(text, rate) for text, rate in found if rate == rate], bandwidth, name
