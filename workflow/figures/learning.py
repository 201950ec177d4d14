"""How soon each stage has learned: test accuracy against seconds of training.

Above: the share of test images that are recognised at moments of a training, on a logarithmic scale
of time; evaluating takes no training time. Below: when each stage first reached the accuracy that
all of them reach. Every stage computes the same up to rounding, so the curves have nearly one shape
(figure parting shows how nearly), and a quicker stage's curve lies further to the left. Hollow
marks on a dashed line are extrapolated: the accuracy is that of another stage after as many images,
and the moment follows from the stage's own measured time per image. There is one training for each
stage, from the same initial weights.
"""

import math

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import frames, layout, panels, reasons, recognition, style, wording
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
    """Accuracy by time of all stages, with the accuracy that all of them reach."""
    style.seconds_axis(axes, seconds, which="x")
    layout.title(axes, panel.title, width, color=style.INK)
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 103)
    axes.tick_params(labelbottom=False)
    axes.axhline(goal(panel), color=style.QUIET, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    for line in recognition.lines(panel.lines):
        mark = style.mark(line["stage"].iloc[0])
        percent = 100 * line["test_accuracy"]
        for borrowed, part in frames.groups(line, "borrowed", sort=True):
            own = line[~line["borrowed"]].tail(1) if borrowed else part.iloc[:0]
            joined = pd.concat([own, part])
            axes.plot(
                joined["train_seconds"],
                percent[joined.index],
                color=mark.color,
                linewidth=1.8,
                linestyle=(0, (4, 2)) if borrowed or panel.emulated else "-",
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
                markerfacecolor="white" if borrowed else mark.color,
                zorder=3,
            )


def draw_moments(axes: Axes, panel: panels.Panel, seconds: pd.Series, width: float) -> None:
    """A row for each stage: when it first reached the accuracy that all of them reach."""
    style.seconds_axis(axes, seconds, which="x")
    lines = recognition.lines(panel.lines)
    names = [name_of(line, lines) for line in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=10.5, weight="bold")
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(False, axis="y")
    what = f"training time until {goal(panel)} % of the test images are recognised"
    axes.set_xlabel(layout.wrapped(what, 0.7 * width, 11))
    left, right = axes.get_xlim()
    for row, (line, text) in enumerate(zip(lines, axes.get_yticklabels(), strict=True)):
        mark = style.mark(line["stage"].iloc[0])
        text.set_color(mark.color)
        first = reached(line, goal(panel))
        time, borrowed = first["train_seconds"], bool(first["borrowed"])
        axes.plot([left, time], [row, row], color=mark.color, linewidth=1.4, alpha=0.45)
        axes.plot(
            time,
            row,
            marker=mark.marker,
            markersize=9,
            color=mark.color,
            markeredgewidth=1.6,
            markerfacecolor="white" if borrowed else mark.color,
        )
        # To the left of the marks at the right edge, where there is no room behind them.
        room = 0.75 if width > 5 else 0.5
        late = math.log(time / left) > room * math.log(right / left)
        axes.annotate(
            wording.duration(time) + (", extrapolated" if borrowed else ""),
            (time, row),
            xytext=(-11 if late else 11, 0),
            textcoords="offset points",
            fontsize=10,
            ha="right" if late else "left",
            va="center",
            color=mark.color,
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )


def name_of(line: pd.DataFrame, lines: list[pd.DataFrame]) -> str:
    """The stage's title, with its device where it ran on several."""
    stage, device = line[["stage", "device"]].iloc[0]
    twice = sum(other["stage"].iloc[0] == stage for other in lines) > 1
    name = wording.brief(wording.title(stage))
    return f"{name}, {wording.brief(wording.device(device))}" if twice else name


def goal(panel: panels.Panel) -> int:
    """The accuracy in whole percents that all lines of the panel reach."""
    # Rounded first: 0.29 * 100 is a little less than 29.
    lines = recognition.lines(panel.lines)
    best = [round(100 * float(line["test_accuracy"].max()), 6) for line in lines]
    return math.floor(min(best))


def reached(line: pd.DataFrame, percent: int) -> pd.Series:
    """The first point of a line with this accuracy or a better one."""
    return line[round(100 * line["test_accuracy"], 6) >= percent].iloc[0]


def title(panel: panels.Panel) -> str:
    """When the quickest and the slowest stage reach the accuracy that all of them reach."""
    found = [reached(line, goal(panel)) for line in recognition.lines(panel.lines)]
    found.sort(key=lambda row: row["train_seconds"])
    what = f"{goal(panel)} % of the test images"
    text = f"{found[0]['stage']} recognises {what} {recognition.after(found[0])}"
    if len(found) > 1:
        text += f", {found[-1]['stage']} {recognition.after(found[-1])}"
    return text + (f" ({wording.EMULATED})" if panel.emulated else "")


def subtitle(rows: pd.DataFrame) -> str:
    """The devices; what was evaluated."""
    images = sorted(set(rows["test_images"]))
    sizes = sorted(set(rows["batch_size"]))
    return (
        f"{panels.devices(rows)}\n"
        f"batch {', '.join(map(str, sizes))}; accuracy over the first "
        f"{', '.join(f'{count:,}' for count in images)} test images, evaluated after 1, 2, 4, ... "
        "steps and after each epoch"
    )
