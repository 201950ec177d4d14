"""How an epoch's time is divided when only some of the images fit on the GPU at a time.

There is one panel for each stage: the time in which the host gathers images, that of the copies to
the GPU and that of the kernels, as shares of the epoch, against the number of images resident per
load; above it, the time of the epoch. Host and GPU work side by side, so the shares may add up to
more than 100 %. Kernels are timed from the first to the last of a load, including the gaps between
their launches; time that no part fills is waiting at the ends of loads. Where stages were timed on
different numbers of images, compare shares, not epochs.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import ladder, layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("transfers",)

PARTS = {
    "kernel_seconds": ("kernels", style.Mark("#009e73", "v")),
    "gather_seconds": ("gathering", style.Mark("#5c5c5c", "o")),
    "upload_seconds": ("copies", style.Mark("#0072b2", "s")),
}


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """A panel a stage, side by side."""
    transfers = every = tables["transfers"]
    transfers = transfers[(transfers["status"] == "ok") & (transfers["epoch_seconds"] > 0)]
    cell = panels.first_cell(transfers)
    if cell is None:
        why = "No stage of the sweep has loaded images onto a GPU."
        return layout.nothing(sheet, "Transfers were not measured", why, reasons.left_out(every))
    what = panels.named(cell, transfers)
    transfers = panels.of_cell(transfers, cell).copy()
    for part in PARTS:
        transfers[part] = 100 * transfers[part] / transfers["epoch_seconds"]
    stages = ladder.ordered(transfers["stage"])
    figure, row = pyplot.subplots(
        1,
        len(stages),
        figsize=sheet.size(2.0 + 4.6 * len(stages), 5.6),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    words = layout.headline(
        figure,
        sheet,
        title(transfers, stages),
        subtitle(transfers, what),
        left_out=reasons.left_out(every, cell),
    )
    waiting = []
    for axes, stage in zip(row.flat, stages, strict=True):
        waiting.append((axes, draw_stage(axes, transfers[transfers["stage"] == stage], stage)))
    row.flat[0].set_ylabel("share of the epoch")
    row.flat[0].set_ylim(0, max(105.0, np.nanmax(transfers[list(PARTS)]) * 1.1))
    row.flat[0].yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def draw_stage(axes: Axes, rows: pd.DataFrame, stage: str) -> list[style.Label]:
    """Shares by images resident; the labels for the right edge."""
    emulated = bool((rows["device_kind"] == "emulated").all())
    sizes = sorted(set(rows["resident_images"]))
    style.quantity_axis(
        axes, "x", sizes, lambda value: f"{value:,.0f}", steps=(1, 2, 4, 8), base=16, margin=1.4
    )
    # The last size but one may lie so near the last that their numbers would overlap.
    named = [s for s, larger in zip(sizes, [*sizes[1:], np.inf], strict=True) if larger > 2.9 * s]
    axes.set_xticks(named, [f"{size:,}" for size in named], fontsize=8.5)
    axes.set_xlabel("images on the GPU per load")
    axes.grid(False, axis="x")
    built = f"\n({wording.EMULATED})" if emulated else ""
    axes.set_title(wording.title(stage) + built, fontsize=11, loc="left", pad=22)
    labels = []
    for part, (name, mark) in PARTS.items():
        middle = panels.spread_line(axes, rows, "resident_images", part, mark, emulated)
        labels.append(
            style.Label(sizes[-1], middle.iloc[-1], f"{name} {middle.iloc[-1]:.0f} %", mark.color)
        )
    epochs = rows.groupby("resident_images")["epoch_seconds"].median()
    for size, seconds in epochs[named].items():
        axes.annotate(
            wording.duration(seconds),
            (size, 1.02),
            xycoords=axes.get_xaxis_transform(),
            ha="center",
            fontsize=8.5,
            color=style.QUIET,
        )
    return labels


def title(transfers: pd.DataFrame, stages: list[str]) -> str:
    """The result in one sentence: how much longer small loads make an epoch of the last stage."""
    rows = transfers[transfers["stage"] == stages[-1]]
    epochs = rows.groupby("resident_images")["epoch_seconds"].median()
    least, most = epochs.index.min(), epochs.index.max()
    if least == most:
        return f"Where an epoch of {stages[-1]} goes"
    factor = epochs[least] / epochs[most]
    built = f" ({wording.EMULATED})" if (rows["device_kind"] == "emulated").all() else ""
    return (
        f"Loads of {least:,} images make an epoch of {stages[-1]} "
        f"{wording.times(factor)} as long as loads of {most:,}{built}"
    )


def subtitle(transfers: pd.DataFrame, what: str) -> str:
    """Network, device, batch; what is counted, and how."""
    names = "; ".join(dict.fromkeys(map(wording.device, transfers["device"])))
    images = transfers["images"]
    count = f"{images.min():,}" + ("" if images.min() == images.max() else f" to {images.max():,}")
    epochs = transfers.groupby(["stage", "resident_images"]).size().min()
    return (
        f"{what}, batch {transfers['batch_size'].iloc[0]}; {names}\n"
        f"median of {epochs} epochs of {count} images, bars: quartiles; "
        "the number above each load: time of the epoch"
    )
