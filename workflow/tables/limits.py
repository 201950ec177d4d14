"""The machine's own limits: latencies, bandwidths and peak arithmetic of its GPU and its CPU.

cnnlib/probes/ says how each is measured. Of what was measured at many sizes the smallest and the
largest are here (figure memory_latency shows them all); a copy of the smallest size is a latency.
"""

import pandas as pd

from workflow.plotting import frames, wording

TABLES = ("probes",)

# In the order of the table; probes that are not named here come last under their own names.
WORDS = {
    "launch": "launch of a kernel, one of many in a row",
    "launch_host": "the host's time for such a launch",
    "event": "event recorded and waited for",
    "barrier_block": "barrier of a block of 256 threads",
    "barrier_grid": "barrier of a grid, one block a multiprocessor",
    "chase_shared": "load from shared memory",
    "chase_global": "load from device memory or its caches",
    "copy_device": "copy within device memory, read and written",
    "copy_up_pinned": "copy to the GPU, pinned",
    "copy_down_pinned": "copy from the GPU, pinned",
    "copy_up_pageable": "copy to the GPU, pageable",
    "copy_down_pageable": "copy from the GPU, pageable",
    "peak_fp32": "fused multiply-adds of float32",
    "peak_tf32": "products of matrices in TF32 by mma.sync",
    "chase_cpu": "load from memory or its caches",
    "copy_cpu": "copy within memory, read and written, one thread",
    "blas_one": "product of float32 matrices by BLAS, one thread",
    "blas_all": "product of float32 matrices by BLAS, all threads",
}
COLUMNS = [
    "device",
    "device_kind",
    "probe",
    "size_bytes",
    "n",
    "median",
    "low",
    "high",
    "unit",
    "status",
]


def make(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Median, lowest and highest in `unit` of each probe at its smallest and its largest size."""
    rows = tables["probes"].copy()
    rows["order"] = rows["probe"].map({name: at for at, name in enumerate(WORDS)})
    lines = []
    for (device, kind), own in frames.groups(rows, ["device", "device_kind"]):
        for probe, group in frames.groups(own.sort_values("order", kind="stable"), "probe"):
            good = group[group["status"] == "ok"]
            if good.empty:
                lines.append([device, kind, probe, 0, 0, *[None] * 3, "", group["status"].iloc[0]])
                continue
            least, most = good["size_bytes"].min(), good["size_bytes"].max()
            for size in dict.fromkeys((least, most)):
                at = good[good["size_bytes"] == size]
                short = probe.startswith(("copy_up", "copy_down")) and size < most
                values = at["seconds" if short else "rate"]
                lines.append(
                    [
                        device,
                        kind,
                        probe,
                        size,
                        len(at),
                        values.median(),
                        values.min(),
                        values.max(),
                        "s" if short else at["unit"].iloc[0],
                        "ok",
                    ]
                )
    numbers = {"median": float, "low": float, "high": float}
    return pd.DataFrame(lines, columns=COLUMNS).astype(numbers)


def markdown(frame: pd.DataFrame) -> str:
    """One table a device."""
    parts = []
    for device, lines in frames.groups(frame, "device"):
        table = [["what", "size", "median", "lowest to highest", "n"], ["---"] + ["---:"] * 4]
        for line in frames.rows(lines):
            what = WORDS.get(line.probe, line.probe)
            size = wording.size(line.size_bytes) if line.size_bytes else ""
            if line.status != "ok":
                table.append([what, size, wording.STATUS.get(line.status, line.status), "", ""])
                continue
            low, middle, high = (written(v, line.unit) for v in (line.low, line.median, line.high))
            table.append([what, size, middle, f"{low} to {high}", str(line.n)])
        parts.append(f"**{wording.device(device)}**\n\n{wording.markdown_table(table)}")
    if not parts:
        return "The machine's own limits were not measured.\n"
    return "\n".join([*parts, "Medians over n repeats.\n"])


def written(value: float, unit: str) -> str:
    """A time in a unit that suits, or a rate."""
    return wording.duration(value) if unit == "s" else f"{wording.digits(value)} {unit}"
