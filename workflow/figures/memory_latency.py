"""How long one access to memory takes, and how fast copies are, by the amount of memory touched.

Left: one thread follows addresses in random order, each load waiting for the one before, in memory
of growing size; every step up is a level of memory that no longer holds all of it. Right: copies
between host and GPU, timed until the host knows that they are complete; small ones are all latency.
The GPU itself reads host memory that is page-locked (pinned); pageable memory is first copied to
such memory. Lines are medians over the repeats, bands reach from the lowest value to the highest;
all axes are logarithmic.
"""

from collections.abc import Callable, Mapping

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import layout, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("probes",)

CHASES = {
    "chase_cpu": ("CPU memory", style.Mark("#5c5c5c", "o")),
    "chase_global": ("GPU memory", style.Mark("#1857a8", "D")),
    "chase_shared": ("GPU shared", style.Mark("#009e73", "v")),
}
COPIES = {
    "copy_up_pinned": ("to GPU, pinned", style.Mark("#0072b2", "^")),
    "copy_down_pinned": ("from GPU, pinned", style.Mark("#3a9bd9", "v")),
    "copy_up_pageable": ("to GPU, pageable", style.Mark("#b87700", "^")),
    "copy_down_pageable": ("from GPU, pageable", style.Mark("#c264a0", "v")),
    "copy_cpu": ("within CPU memory", style.Mark("#5c5c5c", "o")),
}
LEVEL = 1.15
"""Latencies within this factor of the first one of a run are one level of memory."""
MARKED = ("chase_cpu", "chase_global")
"""Probes whose levels of memory are written above their line."""
GPU_LEVELS = ("L1", "L2", "device memory")
"""Their names if there are as many levels: every GPU that CUDA runs on today has these."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Latency on the left, bandwidth on the right."""
    probes = tables["probes"]
    good = probes[(probes["status"] == "ok") & (probes["size_bytes"] > 0)]
    chased, copied = (good[good["probe"].isin(names)] for names in (CHASES, COPIES))
    if not len(chased):
        return layout.nothing(sheet, "Memory latency was not measured", "There are no such probes.")
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=sheet.size(13.2, 6.0), layout="constrained"
    )
    words = layout.headline(figure, sheet, title(chased), subtitle(chased))
    sizes_axis(left, chased["size_bytes"], "memory touched")
    style.seconds_axis(left, chased["rate"], steps=(1, 2, 5))
    left.set_ylabel("time of one load")
    labels = lines(left, chased, CHASES, wording.duration)
    mark_levels(left, chased)
    waiting = [(left, labels)]
    if len(copied):
        sizes_axis(right, copied["size_bytes"], "bytes copied")
        steps = (1,) if copied["rate"].max() > 100 * copied["rate"].min() else (1, 2, 5)
        style.quantity_axis(right, "y", copied["rate"], lambda value: f"{value:g}", steps)
        right.set_ylabel("GB/s copied")
        waiting.append((right, lines(right, copied, COPIES, lambda v: f"{v:.3g} GB/s")))
    else:
        right.axis("off")
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def sizes_axis(axes: Axes, sizes: pd.Series, name: str) -> None:
    """Bytes on a logarithmic axis, in kB, MB and GB."""
    steps = (1, 32) if sizes.max() / sizes.min() > 2**13 else (1, 4, 32, 256)
    style.quantity_axis(axes, "x", sizes, wording.size, steps=steps, base=1024, margin=1.3)
    axes.set_xlabel(name)


def lines(
    axes: Axes,
    rows: pd.DataFrame,
    probes: Mapping[str, tuple[str, style.Mark]],
    write: Callable[[float], str],
) -> list[style.Label]:
    """A line a probe; the labels for the right edge, with the last value."""
    labels = []
    for probe, (name, mark) in probes.items():
        sizes = rows[rows["probe"] == probe].groupby("size_bytes")["rate"]
        middle = sizes.median()
        if len(middle):
            axes.fill_between(
                middle.index, sizes.min(), sizes.max(), color=mark.color, alpha=0.18, linewidth=0
            )
            axes.plot(
                middle.index,
                middle,
                color=mark.color,
                marker=mark.marker,
                markersize=6,
                linewidth=2,
            )
            labels.append(
                style.Label(
                    rows["size_bytes"].max(),
                    middle.iloc[-1],
                    f"{name}  {write(middle.iloc[-1])}",
                    mark.color,
                    mark.marker,
                )
            )
    return labels


def levels(middle: pd.Series) -> list[pd.Series]:
    """Runs of at least three sizes whose latencies lie close together: a level of memory each."""
    runs: list[list[int]] = []
    for size, latency in zip(middle.index, middle, strict=True):
        if runs and 1 / LEVEL <= latency / middle[runs[-1][0]] <= LEVEL:
            runs[-1].append(size)
        else:
            runs.append([size])
    return [middle[run] for run in runs if len(run) >= 3]


def mark_levels(axes: Axes, rows: pd.DataFrame) -> None:
    """The latency of each level, written above it unless it is at the line's end."""
    for probe in MARKED:
        middle = rows[rows["probe"] == probe].groupby("size_bytes")["rate"].median()
        found = levels(middle)
        known = probe == "chase_global" and len(found) == len(GPU_LEVELS)
        for level, name in zip(found, GPU_LEVELS if known else [""] * len(found), strict=True):
            if level.index[-1] == middle.index[-1]:
                break
            at = float(level.index[0] * level.index[-1]) ** 0.5
            axes.annotate(
                f"{name} {wording.duration(level.median())}".strip(),
                (at, level.max()),
                xytext=(0, 10),
                textcoords="offset points",
                ha="center",
                fontsize=10,
                color=style.INK,
            )


def title(chased: pd.DataFrame) -> str:
    """The latencies of the nearest and the farthest memory, as they are written in the panel."""
    gpu = chased[chased["device_kind"] == "cuda"]
    middle = (gpu if len(gpu) else chased).groupby(["probe", "size_bytes"])["rate"].median()
    who = "The GPU" if len(gpu) else "The CPU"
    written = []
    for probe, line in middle.groupby("probe"):
        alone = line.droplevel("probe")
        found = levels(alone) if probe in MARKED else []
        inner = [level for level in found if level.index[-1] != alone.index[-1]]
        written += [*(level.median() for level in inner), alone.iloc[-1]]
    return (
        f"{who} waits {wording.duration(min(written))} for its nearest memory, "
        f"{wording.duration(max(written))} for its farthest"
    )


def subtitle(chased: pd.DataFrame) -> str:
    """The devices; what is counted, and how."""
    names = "; ".join(dict.fromkeys(map(wording.device, chased["device"])))
    repeats = chased.groupby(["probe", "size_bytes"]).size().min()
    noun = "repeat" if repeats == 1 else "repeats"
    return (
        f"{names}\nleft: loads of one thread, each waiting for the one before, in random order; "
        "right: copies one at a time, the CPU's by one thread; "
        f"medians of {repeats} {noun}, bands from lowest to highest"
    )
