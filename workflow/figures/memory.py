"""How much memory each stage takes: in the course of a run, and at its peak for each batch size.

Left: device memory of the GPU stages, read by NVML every ten milliseconds while the run is set up,
checked, warmed up, timed and profiled. Right: the largest amount that the process held, median over
the repeats, beside the card's capacity. The amount before the first image (the CUDA context and the
kernels) is the same for all stages. Without a GPU it is the memory of the process on the host.
"""

import matplotlib.patheffects as effects
import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import frames, ladder, layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("samples", "epochs")

MIB = 2**20
PHASES = {
    "open": "set up",
    "validate": "check",
    "warm_up": "warm up",
    "train": "timed epochs",
    "evaluate": "timed epochs",
    "profile": "kernels",
    "learn": "learning curve",
    "sustain": "energy",
}
SHADES = ("#f4f4f4", "#e9eef4")
RUN = ["stage", "device", "device_kind", "batch_size", "repeat"]
PANEL, LETTER, LINE = 6.6, 0.066, 0.115
"""Inches: a trace's width, a letter's width in its bands and the height of a line there."""
FRAME = 1.9
"""Inches of the figure's height that are not the traces'."""
UPWARD = 0.65
"""Share of a trace's height that is left for names that are written upward."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Traces at one batch size on the left, peaks against batch size on the right."""
    cell = panels.first_cell(tables["samples"])
    if cell is None:
        return layout.nothing(
            sheet,
            "No memory samples",
            "The table has no rows.",
            reasons.left_out(tables["epochs"]),
        )
    named = panels.named(cell, tables["samples"])
    samples = panels.of_cell(tables["samples"], cell)
    samples = samples[samples["phase"] != "close"]
    epochs = panels.of_cell(tables["epochs"], cell)
    # The memory of a run that did not get to train says nothing about training.
    trained = epochs.loc[epochs["status"] == "ok", RUN].drop_duplicates()
    samples, what = choose(samples.merge(trained, on=RUN))
    if not len(samples):
        return layout.nothing(
            sheet,
            "No memory samples",
            "Neither NVML nor the system reported any.",
            reasons.left_out(epochs),
        )
    on_gpu = bool((samples["device_kind"] == "cuda").all())
    peaks = samples.groupby(RUN, sort=False)["memory"].max().reset_index()
    size = common_batch(peaks)
    shown = samples[samples["batch_size"] == size]
    traced = ladder.ordered(shown["stage"])
    figure = pyplot.figure(
        figsize=sheet.size(14.0, max(6.4, FRAME + 1.5 * len(traced))), layout="constrained"
    )
    words = layout.headline(
        figure,
        sheet,
        title(peaks, on_gpu),
        subtitle(peaks, named, size, what),
        notes(reasons.without_left_out(epochs), on_gpu),
        reasons.left_out(epochs),
    )
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.05))
    ends, top = shown["time_seconds"].max(), shown["memory"].max()
    traces = grid[0, 0].subgridspec(len(traced), 1).subplots(sharex=True, squeeze=False)[:, 0]
    height = UPWARD * (figure.get_figheight() - FRAME) / len(traced)
    for axes, stage in zip(traces, traced, strict=True):
        draw_trace(axes, shown[shown["stage"] == stage], stage, ends, top, height)
    traces[-1].set_xlabel("seconds since the run began")
    capacity = samples["device_memory_total_mib"].max() * MIB if on_gpu else np.nan
    kinds = [part for _, part in peaks.groupby(peaks["device_kind"] == "emulated")]
    drawn = [
        (axes, draw_peaks(axes, part, capacity))
        for axes, part in zip(
            grid[0, 1].subgridspec(len(kinds), 1).subplots(squeeze=False)[:, 0], kinds, strict=True
        )
    ]
    style.end_labels(figure, drawn)
    return Drawing(figure, words)


def choose(samples: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The samples with their `memory` in bytes, and in words whose memory it is.

    That of the process on the GPU; of all that use the GPU, where one run's own is not known; of
    the process on the host, where there is no GPU.
    """
    # a card shared by MIG may report its processes' memory and not its own
    known = samples[["device_memory_mib", "process_memory_mib"]].notna().any(axis=1)
    gpu = samples[(samples["device_kind"] == "cuda") & known]
    if not len(gpu):
        column, what = "host_memory_mib", "of the process and its children on the host"
    elif gpu.groupby(RUN)["process_memory_mib"].count().all():
        samples, column, what = gpu, "process_memory_mib", "of the process on the device, by NVML"
    else:
        samples, column, what = gpu, "device_memory_mib", "in use on the device, by NVML"
    samples = samples[samples[column].notna()]
    return samples.assign(memory=samples[column] * MIB), what


def common_batch(peaks: pd.DataFrame) -> int:
    """The largest batch size that all stages have, or else the largest of all."""
    of_stages = [set(group) for _, group in peaks.groupby("stage")["batch_size"]]
    return int(max(set.intersection(*of_stages) or set.union(*of_stages)))


def draw_trace(
    axes: Axes, rows: pd.DataFrame, stage: str, ends: float, top: float, height: float
) -> None:
    """The first repeat's memory against time, its phases as bands; names up to `height` inches."""
    rows = rows[rows["repeat"] == rows["repeat"].min()]
    mark, emulated = style.mark(stage), bool((rows["device_kind"] == "emulated").all())
    name = f"{wording.title(stage)} ({wording.EMULATED})" if emulated else wording.title(stage)
    axes.set_title(name, loc="left", fontsize=10, color=mark.color)
    axes.grid(False)
    axes.set_xlim(0, ends)
    axes.set_ylim(0, top * 1.15)
    names = rows["phase"].map(lambda phase: PHASES.get(phase, phase))
    change = (names != names.shift()).cumsum()
    starts = [*rows.groupby(change)["time_seconds"].first(), rows["time_seconds"].max()]
    for i, phase in enumerate(names.groupby(change).first()):
        axes.axvspan(starts[i], starts[i + 1], color=SHADES[i % 2], linewidth=0, zorder=0)
        write_phase(axes, phase, starts[i], starts[i + 1], height)
    axes.plot(
        rows["time_seconds"],
        rows["memory"],
        color=mark.color,
        linewidth=2,
        linestyle=(0, (4, 2)) if emulated else "-",
    )
    axes.fill_between(rows["time_seconds"], rows["memory"], color=mark.color, alpha=0.15)
    axes.set_yticks([0, rows["memory"].max()])
    axes.set_yticklabels(["0", wording.size(rows["memory"].max())])


def write_phase(axes: Axes, name: str, began: float, ended: float, height: float) -> None:
    """The name of a phase in its band, upward in a narrow one; left out where there is no room."""
    width = (ended - began) / axes.get_xlim()[1] * PANEL
    along = width > LETTER * (len(name) + 1)
    if not along and (width < LINE or LETTER * len(name) > height):
        return
    text = axes.annotate(
        name,
        ((began + ended) / 2, 0.06),
        xycoords=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=8,
        color=style.QUIET,
        rotation=0 if along else 90,
        zorder=4,
    )
    text.set_path_effects([effects.withStroke(linewidth=2.5, foreground="white", alpha=0.7)])


def draw_peaks(axes: Axes, peaks: pd.DataFrame, capacity: float) -> list[style.Label]:
    """Peaks by batch size, a line a stage, and what the card has; labels for the right edge."""
    sizes = sorted(set(peaks["batch_size"]))
    style.batch_axis(axes, sizes)
    values = [*peaks["memory"], *([capacity] if np.isfinite(capacity) else [])]
    every = 4 if max(values) / min(values) > 16 else 2
    style.quantity_axis(
        axes,
        "y",
        values,
        wording.size,
        steps=[every**k for k in range(10) if every**k < 1024],
        base=1024,
        margin=1.25,
    )
    emulated = bool((peaks["device_kind"] == "emulated").all())
    axes.set_ylabel("peak memory")
    heading = "Peak against the batch size" + (f" ({wording.EMULATED})" if emulated else "")
    axes.set_title(heading, fontsize=11, loc="left", color=style.INK)
    labels = []
    for stage in ladder.ordered(peaks["stage"]):
        mark = style.mark(stage)
        group = peaks[peaks["stage"] == stage]
        middle = panels.spread_line(axes, group, "batch_size", "memory", mark, emulated)
        written = wording.size(middle.iloc[-1])
        text = panels.end_label(wording.title(stage), written, middle.index[-1], sizes)
        labels.append(style.Label(sizes[-1], middle.iloc[-1], text, mark.color))
    if np.isfinite(capacity):
        axes.axhline(capacity, color=style.INK, linewidth=1.2, linestyle=(0, (1, 2)))
        labels.append(
            style.Label(sizes[-1], capacity, f"the card  {wording.size(capacity)}", style.INK)
        )
    return labels


def title(peaks: pd.DataFrame, on_gpu: bool) -> str:
    """The result in one sentence: the least and the most memory at the largest batch size."""
    measured = peaks[peaks["device_kind"] != "emulated"]
    built = "" if len(measured) else f" ({wording.EMULATED})"
    peaks = measured if len(measured) else peaks
    size = common_batch(peaks)
    largest = peaks[peaks["batch_size"] == size]
    need = largest.groupby("stage")["memory"].median().sort_values(kind="stable")
    where = "" if on_gpu else " on the host"
    least, most = need.index[0], need.index[-1]
    text = f"{least} needs {wording.size(need.iloc[0])}{where} at batch {size}"
    return (text if least == most else f"{text}, {most} {wording.size(need.iloc[-1])}") + built


def subtitle(peaks: pd.DataFrame, named: str, size: int, what: str) -> str:
    """Network, devices; what is counted, and how."""
    return (
        f"{named}; {panels.devices(peaks)}\n"
        f"memory {what}; left: batch {size}, first repeat; right: median of "
        f"{panels.repeats(peaks)}, bars: quartiles"
    )


def notes(epochs: pd.DataFrame, on_gpu: bool) -> str:
    """Which stages did not get to train at some batch sizes, and at which."""
    failed = epochs[epochs["status"] != "ok"]
    if on_gpu:
        failed = failed[failed["device_kind"] == "cuda"]
    parts = []
    for (stage, status), group in frames.groups(failed, ["stage", "status"]):
        sizes = ", ".join(map(str, sorted(set(group["batch_size"]))))
        parts.append(f"{stage} {wording.STATUS.get(status, status)} at batch {sizes}")
    return f"Left out: {'; '.join(parts)}." if parts else ""
