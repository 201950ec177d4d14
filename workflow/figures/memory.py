"""How much memory each stage takes at its peak, at the usual and at the largest batch size.

There is one bar for each stage on the GPU: the largest amount that its process held on the device,
read by NVML every ten milliseconds, median over the repeats. Light grey is the CUDA context, which
every program has that computes on the card: the least that a stage's process held when it had just
been set up. What is coloured belongs to the training: the data set, weights, maps, and what a
library keeps for itself. Without a GPU it is the memory of the process on the host, and there is no
context.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from cnnlib.measuring.runs import usual_size
from workflow.plotting import (
    accuracies,
    frames,
    ladder,
    layout,
    panels,
    reasons,
    shading,
    style,
    wording,
)
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("samples", "epochs")

MIB = 2**20
RUN = ["stage", "device", "device_kind", "batch_size", "repeat"]
CONTEXT = "#c9c9c9"
STARTED = 64
"""MiB of a process from which on it counts as having a context: before, it only loads libraries."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Bars at two batch sizes, side by side; emulated stages below them."""
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
    context = context_of(samples) if on_gpu else 0.0
    peaks = samples.groupby(RUN, sort=False)["memory"].max().reset_index()
    accuracy = accuracies.of_epochs(epochs)
    told = of_title(peaks, accuracy)
    sizes = [told] if sheet.compact else shown(peaks)
    kinds = [part for _, part in peaks.groupby(peaks["device_kind"] == "emulated")]
    stages = [ladder.ordered(part["stage"]) for part in kinds]
    heights = [0.6 + 0.36 * len(rows) for rows in stages]
    figure, grid = pyplot.subplots(
        len(kinds),
        len(sizes),
        figsize=sheet.size(14.0, 2.4 + sum(heights)),
        squeeze=False,
        sharex=True,
        height_ratios=heights,
        layout="constrained",
    )
    capacity = samples["device_memory_total_mib"].max() * MIB if on_gpu else np.nan
    words = layout.headline(
        figure,
        sheet,
        title(peaks[peaks["batch_size"] == told], on_gpu, context),
        subtitle(peaks, named, what),
        notes(reasons.without_left_out(epochs), on_gpu, context, capacity),
        reasons.left_out(epochs),
    )
    for row, part, names in zip(grid, kinds, stages, strict=True):
        for axes, size in zip(row, sizes, strict=True):
            reached = shading.reached(accuracy[accuracy["batch_size"] == size])
            draw_bars(axes, part[part["batch_size"] == size], names, context)
            built = bool((part["device_kind"] == "emulated").all())
            heading = f"Peak at batch {size}" + (f" ({wording.EMULATED})" if built else "")
            layout.title(axes, f"{heading}{reached}", 6.2, color=style.INK)
        for axes in row[1:]:
            axes.tick_params(labelleft=False)
    largest = peaks.loc[peaks["batch_size"].isin(sizes), "memory"].max()
    grid[0, 0].set_xlim(0, (1.35 if sheet.compact else 1.18) * largest)
    for axes in grid.flat:
        ticks = step_of(largest) * np.arange(6)
        axes.set_xticks([tick for tick in ticks if tick < 1.12 * largest])
        axes.xaxis.set_major_formatter(lambda value, _: wording.size(value) if value else "0")
    return Drawing(figure, words)


def step_of(largest: float) -> float:
    """A round number of bytes of which two to five reach up to `largest`."""
    steps = [2.0**power for power in range(10, 50)]
    return next(step for step in steps if 5 * step >= largest)


def shown(peaks: pd.DataFrame) -> list[int]:
    """The usual batch size and the largest one, of those that all stages have."""
    of_stages = [set(group) for _, group in peaks.groupby("stage")["batch_size"]]
    both = set.intersection(*of_stages) or set.union(*of_stages)
    return sorted({usual_size(both), common_batch(peaks)})


def context_of(samples: pd.DataFrame) -> float:
    """Bytes that the process of a stage of the ladder has at least, once it has a context."""
    own = ladder.own_rows(samples)
    if own["stage"].isin(ladder.NAMES_OF_PEERS).any():
        return 0.0
    first = own[own["memory"] >= STARTED * MIB].groupby(RUN, sort=False)["memory"].first()
    return float(first.min()) if len(first) else 0.0


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


def draw_bars(axes: Axes, peaks: pd.DataFrame, stages: list[str], context: float) -> None:
    """A bar a stage: the context in grey, the rest in the stage's colour, with its size."""
    axes.set_ylim(len(stages) - 0.45, -0.55)
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(stages)), [wording.brief(wording.title(name)) for name in stages])
    axes.tick_params(axis="y", labelcolor=style.INK, labelsize=10.5)
    for row, stage in enumerate(stages):
        own = peaks.loc[peaks["stage"] == stage, "memory"]
        if not len(own):
            place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "va": "center"}
            axes.annotate("not run", (0.01, row), fontsize=9, color=style.QUIET, **place)
            continue
        middle = float(own.median())
        grey = min(context, middle)
        axes.barh(row, grey, height=0.66, color=CONTEXT, linewidth=0)
        axes.barh(
            row, middle - grey, left=grey, height=0.66, color=style.mark(stage).color, linewidth=0
        )
        low, high = own.quantile(0.25), own.quantile(0.75)
        axes.plot([low, high], [row, row], color=style.INK, linewidth=1.2)
        text = wording.size(middle)
        if grey:
            text += f"   (+{wording.size(middle - grey)})"
        axes.annotate(
            text,
            (max(middle, high), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            annotation_clip=False,
        )


def of_title(peaks: pd.DataFrame, accuracy: pd.DataFrame) -> int:
    """The larger batch size of those that are shown, if it learns enough; else the usual one."""
    usual, *larger = shown(peaks)
    learned = set(accuracies.of_learned(accuracy)["batch_size"])
    return int(max({usual, *learned.intersection(larger)}))


def title(peaks: pd.DataFrame, on_gpu: bool, context: float) -> str:
    """The least and the most memory at one batch size, without a context that is known."""
    measured = peaks[peaks["device_kind"] != "emulated"]
    built = "" if len(measured) else f" ({wording.EMULATED})"
    peaks = measured if len(measured) else peaks
    need = peaks.groupby("stage")["memory"].median().sort_values(kind="stable") - context
    where = " beside the context" if context else "" if on_gpu else " on the host"
    least, most = need.index[0], need.index[-1]
    size = peaks["batch_size"].iloc[0]
    text = f"{wording.said(least)} needs {wording.size(need.iloc[0])}{where} at batch {size}"
    if least != most:
        text += f", {wording.said(most)} {wording.size(need.iloc[-1])}"
    return text + built


def subtitle(peaks: pd.DataFrame, named: str, what: str) -> str:
    """Network, devices; what is counted, and how."""
    return (
        f"{named}; {panels.devices(peaks)}\n"
        f"largest memory {what}; median of {panels.repeats(peaks)}, lines: quartiles"
    )


def notes(epochs: pd.DataFrame, on_gpu: bool, context: float, capacity: float) -> str:
    """What grey is, what the card has, and which stages did not train at some batch sizes."""
    failed = epochs[epochs["status"] != "ok"]
    if on_gpu:
        failed = failed[failed["device_kind"] == "cuda"]
    parts = []
    for (stage, status), group in frames.groups(failed, ["stage", "status"]):
        sizes = ", ".join(map(str, sorted(set(group["batch_size"]))))
        parts.append(f"{wording.said(stage)} {wording.STATUS.get(status, status)} at batch {sizes}")
    said = []
    if context:
        what = (
            f"Light grey: the CUDA context, {wording.size(context)}; in brackets what is beside it."
        )
        said.append(what)
    if np.isfinite(capacity):
        said.append(f"The card has {wording.size(capacity)}.")
    if parts:
        said.append(f"Left out: {'; '.join(parts)}.")
    return " ".join(said)
