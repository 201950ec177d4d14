"""The race: one recipe trained from many seeds, how long it takes and what it recognises.

There is one row for each stage and one dot for each seed. Left: the time of the whole training, on
a logarithmic scale; evaluating the test images is not timed. Right: the share of the test images
that are recognised at its end; the dotted line is what the mean, the larger mark, has to reach.
Every stage computes the same up to rounding, so only the times differ. Grey rows are other
libraries.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import frames, ladder, layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("race", "race_summary")

SPREAD, EACH = 0.56, 5
"""The height over which the dots of a row are spread, and in how many lines."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """A panel for what was measured, and one for emulated stages if there are any."""
    race = tables["race"]
    good = race[race["status"] == "ok"].copy()
    good["percent"] = 100 * good["test_accuracy"]
    if not len(good):
        return layout.nothing(
            sheet,
            "The race was not run",
            "No stage of it could train here.",
            reasons.left_out(race),
        )
    found = panels.split(good)
    heights = [1.0 + 0.46 * panel.lines["stage"].nunique() for panel in found]
    figure, grid = pyplot.subplots(
        len(found),
        2,
        figsize=sheet.size(12.6, 2.1 + sum(heights)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    summary = tables["race_summary"]
    words = layout.headline(
        figure, sheet, title(summary), subtitle(race), notes(summary, race), reasons.left_out(race)
    )
    for (left, right), panel in zip(grid, found, strict=True):
        draw_panel(left, right, panel)
    return Drawing(figure, words)


def draw_panel(left: Axes, right: Axes, panel: panels.Panel) -> None:
    """A row a stage, the quickest first: times of training on the left, accuracies on the right."""
    last = panel.lines[panel.lines["epoch"] == panel.lines["epoch"].max()]
    middle = last.groupby("stage")["train_seconds"].mean().sort_values(kind="stable")
    stages = [str(stage) for stage in middle.index]
    style.seconds_axis(left, [*last["train_seconds"], middle.iloc[-1] * 1.7], (1, 2, 5), which="x")
    left.set_xlabel("time of the whole training")
    right.set_xlabel("test images recognised at its end")
    right.xaxis.set_major_formatter(lambda value, _: f"{value:.4g} %")
    if panel.emulated:
        layout.title(left, panel.title, 5.0, color=style.INK)
    target = 100 * last["target_accuracy"].iloc[0]
    right.axvline(target, color=style.INK, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    for axes in (left, right):
        axes.set_ylim(len(stages) - 0.45, -0.6)
        axes.set_yticks(range(len(stages)), [""] * len(stages))
        axes.grid(False, axis="y")
    names = [wording.brief(wording.title(stage)) for stage in stages]
    left.set_yticks(range(len(stages)), names, fontsize=10.5, color=style.INK)
    for row, stage in enumerate(stages):
        own = last[last["stage"] == stage].sort_values("seed")
        heights = row + SPREAD * (np.arange(len(own)) % EACH - (EACH - 1) / 2) / EACH
        for axes, column, write in (
            (left, "train_seconds", wording.duration),
            (right, "percent", lambda value: f"{value:.2f} %"),
        ):
            draw_row(axes, own[column], heights, row, stage, panel.emulated, write)
    low, high = right.get_xlim()
    right.set_xlim(min(low, target - 0.1), max(high, target + 0.1) + 0.16 * (high - low))


def draw_row(
    axes: Axes,
    values: pd.Series,
    heights: npt.NDArray[np.float64],
    row: int,
    stage: str,
    emulated: bool,
    write: Callable[[float], str],
) -> None:
    """The dots of one stage, and their mean behind the last of them."""
    mean, color = float(values.mean()), style.mark(stage).color
    axes.plot(
        values,
        heights,
        linestyle="none",
        marker=".",
        markersize=5,
        color=color,
        alpha=0.75,
        zorder=2,
    )
    style.chip(axes, (mean, mean), row, style.label(mean, row, "", stage, emulated))
    axes.annotate(
        write(mean),
        (float(values.max()), row),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
        color=style.INK,
        annotation_clip=False,
    )


def finished(summary: pd.DataFrame) -> pd.DataFrame:
    """The stages that have trained to the end, the quickest first; measured ones, if any."""
    good = summary[summary["n"] > 0]
    measured = good[good["device_kind"] != "emulated"]
    return (measured if len(measured) else good).sort_values("train_seconds_mean")


def title(summary: pd.DataFrame) -> str:
    """The result in one sentence: when the two quickest stages have trained to the end."""
    ranked = finished(summary)
    if not len(ranked):
        return "No stage has trained to the end"
    first = ranked.iloc[0]
    text = (
        f"{wording.said(first['stage'])} recognises {100 * first['accuracy_mean']:.2f} % "
        f"of the test images after {wording.duration(first['train_seconds_mean'])} of training"
    )
    if len(ranked) > 1:
        next_one = ranked.iloc[1]
        name = wording.said(next_one["stage"])
        text += f", {name} after {wording.duration(next_one['train_seconds_mean'])}"
    return text + (f" ({wording.EMULATED})" if first["device_kind"] == "emulated" else "")


def subtitle(race: pd.DataFrame) -> str:
    """Network, devices, recipe and how many seeds."""
    first = race.iloc[0]
    count = race.groupby(["stage", "device"])["seed"].nunique().max()
    what = wording.what(first["dataset"], first["network"])
    epochs = race["epoch"].max()
    return (
        f"{what}; {panels.devices(race)}\nbatch {first['batch_size']}, {epochs} epochs; mean over "
        f"{count} {'seed' if count == 1 else 'seeds'}, each of them a dot"
    )


def notes(summary: pd.DataFrame, race: pd.DataFrame) -> str:
    """Stages that have no line, where no more is known; what hollow marks are."""
    bad = summary[summary["n"] == 0]
    bad = bad[bad["stage"].isin(reasons.without_left_out(race)["stage"])]
    said = [
        f"{wording.title(line.stage)}: {wording.STATUS.get(line.status, line.status)}"
        for line in frames.rows(bad)
    ]
    peers = finished(summary)["stage"].isin(ladder.NAMES_OF_PEERS).any()
    grey = ["grey: the same training by other libraries, each at its best"] if peers else []
    return "; ".join([*said, *grey])
