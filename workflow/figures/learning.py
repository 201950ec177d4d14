"""How soon each stage has learned: test accuracy against the time of training.

Above: the share of test images that are recognised after so many images, at the moment that is the
number of images times the stage's time per image in whole epochs; looking at the network takes no
time. Below: what the whole training takes, the same epochs for every stage. Every stage computes
the same up to rounding, so the curves have nearly one shape (figure parting shows how nearly), and
a quicker stage's curve lies further to the left. Hollow marks on a dashed line are extrapolated:
the accuracy is that of another stage after as many images. There is one training for each stage,
from the same initial weights.
"""

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import frames, ladder, layout, panels, reasons, recognition, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("learning", "epochs")

PLACE = ["dataset", "network"]


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """A curve and a strip of moments for each data set and network; emulated stages apart."""
    learning = tables["learning"]
    parts = [recognition.one_run(rows) for _, rows in learning.groupby(PLACE, sort=False)]
    rows = recognition.complete(pd.concat([learning.iloc[:0], *parts]), tables["epochs"])
    rows = rows[rows["test_accuracy"].notna() & (rows["train_seconds"] > 0)]
    if not len(rows):
        return layout.nothing(
            sheet,
            "No learning curve was measured",
            "No run of the sweep was evaluated while it trained.",
            reasons.left_out(tables["epochs"]),
        )
    found = panels.on_a_page(panels.split(rows), sheet)
    counts = [len(recognition.lines(panel.lines)) for panel in found]
    if len(found) < layout.MANY:
        heights = [4.2 + 0.36 * count for count in counts]
        figure = pyplot.figure(figsize=sheet.size(9.5, 1.6 + sum(heights)), layout="constrained")
        ratios = [ratio for count in counts for ratio in (3.6, 0.3 + 0.36 * count)]
        column = list(figure.subplots(len(ratios), 1, height_ratios=ratios))
        pairs = list(zip(column[::2], column[1::2], strict=True))
        width = 7.2
    else:
        heights = [3.3 + 0.30 * count for count in counts]
        small = layout.small_panels(
            sheet, [panel.title for panel in found], heights, panels.names(rows), left=2.0
        )
        figure, width = small.figure, small.width
        grids = [
            place.subgridspec(2, 1, height_ratios=(2.4, 0.3 + 0.30 * count))
            for place, count in zip(small.places, counts, strict=True)
        ]
        pairs = [tuple(grid.subplots(squeeze=False)[:, 0]) for grid in grids]
    words = layout.headline(
        figure,
        sheet,
        title(found[0]),
        subtitle(rows),
        recognition.notes(rows),
        reasons.left_out(tables["epochs"]),
    )
    for (above, below), panel in zip(pairs, found, strict=True):
        draw_curves(above, panel, rows["train_seconds"], width)
        draw_moments(below, panel, rows["train_seconds"], width)
    return Drawing(figure, words)


def draw_curves(axes: Axes, panel: panels.Panel, seconds: pd.Series, width: float) -> None:
    """Accuracy by time of all stages."""
    style.seconds_axis(axes, seconds, which="x")
    layout.title(axes, panel.title, width, color=style.INK)
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 103)
    axes.tick_params(labelbottom=False)
    for line in recognition.lines(panel.lines):
        stage = line["stage"].iloc[0]
        mark, peer = style.mark(stage), stage in ladder.NAMES_OF_PEERS
        percent = 100 * line["test_accuracy"]
        for borrowed, part in frames.groups(line, "borrowed", sort=True):
            own = line[~line["borrowed"]].tail(1) if borrowed else part.iloc[:0]
            joined = pd.concat([own, part])
            axes.plot(
                joined["train_seconds"],
                percent[joined.index],
                color=mark.color,
                linewidth=1.8,
                linestyle=(0, (4, 2)) if borrowed else style.dashes(stage, panel.emulated),
                zorder=2,
            )
            axes.plot(
                part["train_seconds"],
                percent[part.index],
                linestyle="none",
                color=mark.color,
                marker=mark.marker,
                markersize=6,
                markeredgewidth=1.4,
                markerfacecolor="white" if borrowed or peer else mark.color,
                zorder=3,
            )


def draw_moments(axes: Axes, panel: panels.Panel, seconds: pd.Series, width: float) -> None:
    """A row for each stage: what the same whole training takes, and what it reaches."""
    style.seconds_axis(axes, seconds, which="x")
    lines = recognition.lines(panel.lines)
    names = [name_of(line, lines) for line in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=10.5, color=style.INK)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(layout.wrapped(f"time for {whole(panel)}", 0.7 * width, 11))
    left = axes.get_xlim()[0]
    for row, line in enumerate(lines):
        last = line.iloc[-1]
        time, borrowed = float(last["train_seconds"]), bool(last["borrowed"])
        own = style.label(time, row, "", last["stage"], panel.emulated, borrowed)
        axes.plot(
            [left, time], [row, row], color=own.color, linewidth=1.6, linestyle=own.dashes, zorder=2
        )
        style.chip(axes, (time, time), row, own)
        axes.annotate(
            wording.duration(time) + (" (extrapolated)" if borrowed else ""),
            (time, row),
            xytext=(9, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=10,
            color=style.INK,
            annotation_clip=False,
        )


def name_of(line: pd.DataFrame, lines: list[pd.DataFrame]) -> str:
    """The stage's title, with its device where it ran on several."""
    stage, device = line[["stage", "device"]].iloc[0]
    twice = sum(other["stage"].iloc[0] == stage for other in lines) > 1
    name = wording.brief(wording.title(stage))
    return f"{name}, {wording.brief(wording.device(device))}" if twice else name


def whole(panel: panels.Panel) -> str:
    """`the same 119,808 images`: what every line of the panel has been trained on at its end."""
    ends = sorted({int(line["images"].max()) for line in recognition.lines(panel.lines)})
    if len(ends) == 1:
        return f"the same {ends[0]:,} images"
    return f"{ends[0]:,} to {ends[-1]:,} images"


def title(panel: panels.Panel) -> str:
    """What the same training takes by the quickest and the slowest stage, and what it reaches."""
    last = [line.iloc[-1] for line in recognition.lines(panel.lines)]
    last.sort(key=lambda row: row["train_seconds"])
    reached = [100 * float(row["test_accuracy"]) for row in last]
    low, high = f"{min(reached):.1f}", f"{max(reached):.1f}"
    percent = f"{low} %" if low == high else f"{low} to {high} %"
    times = [
        f"{wording.said(row['stage'])} {recognition.after(row).removeprefix('after ')}"
        for row in (last[0], *last[1:][-1:])
    ]
    text = f"The same training takes {', '.join(times)}, and recognises {percent}"
    return text + (f" ({wording.EMULATED})" if panel.emulated else "")


def subtitle(rows: pd.DataFrame) -> str:
    """The devices; what was evaluated."""
    images = sorted(set(rows["test_images"]))
    sizes = sorted(set(rows["batch_size"]))
    return (
        f"{panels.devices(rows)}\n"
        f"batch {', '.join(map(str, sizes))}; accuracy over the first "
        f"{', '.join(f'{count:,}' for count in images)} test images, evaluated after 1, 2, 4, ... "
        "steps and after each epoch; time: images seen times the time per image of whole epochs"
    )
