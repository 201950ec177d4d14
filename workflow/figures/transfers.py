"""What an image costs when only some of the images fit on the GPU at a time.

The time of an epoch divided by its images, a line a stage, against the number of images that are
loaded onto the GPU at a time; so that stages that were timed on different numbers of images can be
compared. Grey lines are parts of the last stage's time: its kernels, from the first to the last of
a load, the host gathering the images of a load, and the copies to the GPU. Host and GPU work side
by side, so the parts overlap and do not add up to the whole; what no part fills is waiting. Medians
and quartiles over the epochs.
"""

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import ladder, layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("transfers",)

GREY = "#767676"
PARTS = {
    "kernel_seconds": ("kernels", style.Mark(GREY, "v"), (0, (1.0, 1.4))),
    "gather_seconds": ("gathering by the host", style.Mark(GREY, "o"), (0, (3.5, 1.6))),
    "upload_seconds": ("copies to the GPU", style.Mark(GREY, "s"), (0, (7.0, 1.8))),
}


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """One panel of time per image; emulated stages have another."""
    transfers = every = tables["transfers"]
    transfers = transfers[(transfers["status"] == "ok") & (transfers["epoch_seconds"] > 0)]
    cell = panels.first_cell(transfers)
    if cell is None:
        why = "No stage of the sweep has loaded images onto a GPU."
        return layout.nothing(sheet, "Transfers were not measured", why, reasons.left_out(every))
    what = panels.named(cell, transfers)
    transfers = panels.of_cell(transfers, cell).copy()
    for part in ("epoch_seconds", *PARTS):
        transfers[part] /= transfers["images"]
    emulated = transfers["device_kind"] == "emulated"
    parts = [
        (built, rows)
        for built, rows in ((False, transfers[~emulated]), (True, transfers[emulated]))
    ]
    parts = [(built, rows) for built, rows in parts if len(rows)]
    figure, column = pyplot.subplots(
        len(parts),
        1,
        figsize=sheet.size(10.5, 1.6 + 4.6 * len(parts)),
        squeeze=False,
        layout="constrained",
    )
    stages = ladder.ordered(parts[0][1]["stage"])
    words = layout.headline(
        figure,
        sheet,
        title(parts[0][1], stages),
        subtitle(transfers, what),
        notes(stages),
        left_out=reasons.left_out(every, cell),
    )
    waiting = []
    for axes, (built, rows) in zip(column.flat, parts, strict=True):
        waiting.append((axes, draw_panel(axes, rows, built)))
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def draw_panel(axes: Axes, rows: pd.DataFrame, emulated: bool) -> list[style.Label]:
    """Time per image by images resident; the labels for the right edge."""
    sizes = sorted(set(rows["resident_images"]))
    style.quantity_axis(
        axes, "x", sizes, lambda value: f"{value:,.0f}", steps=(1, 4), base=16, margin=1.2
    )
    stages = ladder.ordered(rows["stage"])
    last = rows[rows["stage"] == stages[-1]]
    values = [*rows["epoch_seconds"], *last[list(PARTS)].to_numpy().ravel()]
    style.seconds_axis(axes, [value for value in values if value > 0], steps=(1, 2, 5))
    axes.set_xlabel("images on the GPU per load (the last mark: all of them)")
    axes.set_ylabel("time per image")
    axes.grid(False, axis="x")
    if emulated:
        axes.set_title(f"({wording.EMULATED})", fontsize=11, loc="left")
    labels = []
    for part, (name, mark, dashes) in PARTS.items():
        middle = last.groupby("resident_images")[part].median()
        axes.plot(
            middle.index,
            middle.where(middle > 0),
            color=mark.color,
            linestyle=dashes,
            linewidth=1.4,
            marker=mark.marker,
            markersize=4,
        )
        text = f"{wording.said(stages[-1])}: {name}  {wording.duration(middle.iloc[-1])}"
        labels.append(
            style.Label(sizes[-1], middle.iloc[-1], text, mark.color, mark.marker, dashes)
        )
    for stage in stages:
        own = rows[rows["stage"] == stage]
        middle = panels.spread_line(
            axes, own, "resident_images", "epoch_seconds", style.mark(stage), emulated
        )
        text = f"{wording.title(stage)}  {wording.duration(middle.iloc[-1])}"
        labels.append(style.label(sizes[-1], middle.iloc[-1], text, stage, emulated))
    return [label for label in labels if label.y > 0]


def title(transfers: pd.DataFrame, stages: list[str]) -> str:
    """What an image costs the last stage in small and in large loads, in one sentence."""
    rows = transfers[transfers["stage"] == stages[-1]]
    costs = rows.groupby("resident_images")["epoch_seconds"].median()
    least, most = int(costs.index.min()), int(costs.index.max())
    name = wording.said(stages[-1])
    built = f" ({wording.EMULATED})" if (rows["device_kind"] == "emulated").all() else ""
    if least == most:
        return f"An image takes {name} {wording.duration(costs[most])}{built}"
    best = min(costs.index, key=lambda size: float(costs[size]))
    return (
        f"In loads of {least:,} an image takes {name} {wording.duration(costs[least])}, "
        f"in loads of {best:,} {wording.duration(costs[best])}{built}"
    )


def notes(stages: list[str]) -> str:
    """What the grey lines are."""
    return f"Grey: parts of the time of {wording.said(stages[-1])}, which overlap."


def subtitle(transfers: pd.DataFrame, what: str) -> str:
    """Network, device, batch; what is counted, and how."""
    names = "; ".join(dict.fromkeys(map(wording.device, transfers["device"])))
    images = transfers["images"]
    count = f"{images.min():,}" + ("" if images.min() == images.max() else f" to {images.max():,}")
    epochs = transfers.groupby(["stage", "resident_images"]).size().min()
    return (
        f"{what}, batch {transfers['batch_size'].iloc[0]}; {names}\n"
        f"an epoch of {count} images divided by them; median of {epochs} epochs, bars: quartiles"
    )
