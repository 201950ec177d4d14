"""How much memory each stage takes: in the course of a run, and at its peak for each batch size.

Left: device memory of the GPU's stages as NVML tells it every ten milliseconds, while the run is
set up, checked, warmed up, timed and looked at. Right: the most that the process held, median over
the repeats, against the card's capacity; what it holds before the first image (the CUDA context and
the kernels) is the same for all. Where there is no GPU: the memory of the process on the host.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workflow import panels, style, wording

TABLES = ("samples",)

MIB = 2**20
PHASES = {
    "open": "set up", "validate": "check", "warm_up": "warm up", "train": "timed epochs",
    "evaluate": "timed epochs", "profile": "kernels one by one", "learn": "learning curve",
    "sustain": "energy",
}  # fmt: skip
SHADES = ("#f4f4f4", "#e9eef4")
RUN = ["stage", "batch_size", "repeat"]


def draw(tables: dict[str, pd.DataFrame]) -> Figure:
    """Traces at one batch size on the left, peaks against batch size on the right."""
    samples = tables["samples"]
    cell = panels.first_cell(samples)
    if cell is None:
        return style.nothing("Memory was not looked at", "There are no samples.")
    samples = panels.of_cell(samples, cell)
    samples = samples[samples["phase"] != "close"]
    gpu = samples[(samples["device_kind"] == "cuda") & samples["device_memory_mib"].notna()]
    on_gpu = len(gpu) > 0
    if on_gpu:
        samples = gpu.assign(memory=gpu["process_memory_mib"].fillna(gpu["device_memory_mib"]))
    else:
        samples = samples.assign(memory=samples["host_memory_mib"])
    samples = samples[samples["memory"].notna()].assign(memory=lambda rows: rows["memory"] * MIB)
    if not len(samples):
        return style.nothing("Memory was not looked at", "Neither NVML nor the system told of it.")
    peaks = samples.groupby([*RUN, "device_kind"], as_index=False)["memory"].max()
    stages = panels.on_ladder(samples["stage"])
    size = samples["batch_size"].max()
    figure = pyplot.figure(figsize=(14.0, 6.4), layout="constrained")
    grid = figure.add_gridspec(len(stages), 2, width_ratios=(1.15, 1))
    style.headline(figure, title(peaks, stages, on_gpu), subtitle(samples, cell, size, on_gpu))
    traces = [figure.add_subplot(grid[row, 0]) for row in range(len(stages))]
    shown = samples[samples["batch_size"] == size]
    ends, top = shown["time_seconds"].max(), shown["memory"].max()
    for axes, stage in zip(traces, stages, strict=True):
        draw_trace(axes, shown[shown["stage"] == stage], stage, ends, top)
    traces[-1].set_xlabel("seconds since the run began")
    for axes in traces[:-1]:
        axes.tick_params(labelbottom=False)
    capacity = samples["device_memory_total_mib"].max() * MIB if on_gpu else np.nan
    right = figure.add_subplot(grid[:, 1])
    labels = draw_peaks(right, peaks, stages, capacity)
    style.end_labels(right, labels)
    return figure


def draw_trace(axes: Axes, rows: pd.DataFrame, stage: str, ends: float, top: float) -> None:
    """The first repeat's memory against time, its phases as bands."""
    rows = rows[rows["repeat"] == rows["repeat"].min()]
    axes.set_title(wording.title(stage), loc="left", fontsize=10, color=style.mark(stage).color)
    axes.grid(False)
    axes.set_xlim(0, ends)
    if not len(rows):
        return
    names = rows["phase"].map(lambda phase: PHASES.get(phase, phase))
    change = (names != names.shift()).cumsum()
    starts = [*rows.groupby(change)["time_seconds"].first(), rows["time_seconds"].max()]
    for i, name in enumerate(names.groupby(change).first()):
        axes.axvspan(starts[i], starts[i + 1], color=SHADES[i % 2], linewidth=0, zorder=0)
        wide = (starts[i + 1] - starts[i]) / ends > 0.011 * len(name)
        if wide and name:
            axes.annotate(
                name, ((starts[i] + starts[i + 1]) / 2, 0.06), xycoords=axes.get_xaxis_transform(),
                ha="center", fontsize=8, color=style.QUIET,
            )  # fmt: skip
    mark = style.mark(stage)
    axes.plot(rows["time_seconds"], rows["memory"], color=mark.color, linewidth=2)
    axes.fill_between(rows["time_seconds"], rows["memory"], color=mark.color, alpha=0.15)
    axes.set_ylim(0, top * 1.15)
    axes.set_yticks([0, rows["memory"].max()])
    axes.set_yticklabels(["0", wording.size(rows["memory"].max())])


def draw_peaks(
    axes: Axes, peaks: pd.DataFrame, stages: list[str], capacity: float
) -> list[style.Label]:
    """Peaks by batch size, a line a stage, and what the card has; labels for the right edge."""
    sizes = sorted(set(peaks["batch_size"]))
    style.batch_axis(axes, sizes)
    style.quantity_axis(
        axes, "y", [*peaks["memory"], capacity], wording.size, steps=(1, 4, 16, 64, 256), base=1024,
        margin=1.25,
    )  # fmt: skip
    axes.set_ylabel("peak memory of the process")
    axes.set_title("Peak against the batch size", fontsize=11, loc="left", color=style.INK)
    labels = []
    for stage in stages:
        group = peaks[peaks["stage"] == stage]
        host = bool((group["device_kind"] == "host").all())
        mark = style.mark(stage)
        middle = panels.spread_line(axes, group, "batch_size", "memory", mark, host)
        text = f"{wording.title(stage)}  {wording.size(middle.iloc[-1])}"
        labels.append(style.Label(sizes[-1], middle.iloc[-1], text, mark.color))
    if np.isfinite(capacity):
        axes.axhline(capacity, color=style.INK, linewidth=1.2, linestyle=(0, (1, 2)))
        labels.append(
            style.Label(sizes[-1], capacity, f"the card  {wording.size(capacity)}", style.INK)
        )
    return labels


def title(peaks: pd.DataFrame, stages: list[str], on_gpu: bool) -> str:
    """Who needs the least at the largest batch, and how much the most hungry one."""
    largest = peaks[peaks["batch_size"] == peaks["batch_size"].max()]
    need = largest.groupby("stage")["memory"].median().reindex(stages).dropna().sort_values()
    where = "" if on_gpu else " on the host"
    least, most = need.index[0], need.index[-1]
    text = (
        f"{least} needs {wording.size(need.iloc[0])}{where} at batch {largest.iloc[0].batch_size}"
    )
    return text if least == most else f"{text}, {most} {wording.size(need.iloc[-1])}"


def subtitle(samples: pd.DataFrame, cell: tuple[str, str], size: int, on_gpu: bool) -> str:
    """Network, device; what is counted, and how."""
    repeats = samples.groupby(["stage", "batch_size"])["repeat"].nunique()
    names = "; ".join(dict.fromkeys(map(wording.device, samples["device"])))
    what = "of the process on the device, by NVML" if on_gpu else "of the process on the host"
    return (
        f"{wording.what(*cell)}; {names}\n"
        f"memory {what}; left: batch {size}, first repeat; right: median of {repeats.min()} "
        "repeats, bars: quartiles"
    )
