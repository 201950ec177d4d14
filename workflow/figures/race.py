"""The race: one recipe trained from many seeds, test accuracy against milliseconds of training.

There is one line for each stage: the mean over the seeds at the end of each epoch, with the
standard deviation of one seed as bars. Small dots are the single trainings at their end. The dotted
line is the accuracy that the mean has to reach. Every stage computes the same up to rounding, so
the lines reach nearly one height, and a quicker stage's line lies further to the left. Evaluating
the test images is not timed.
"""

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import frames, ladder, layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("race", "race_summary")


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
    figure, column = pyplot.subplots(
        len(found),
        1,
        figsize=sheet.size(10.5, 1.9 + 4.6 * len(found)),
        squeeze=False,
        layout="constrained",
    )
    summary = tables["race_summary"]
    words = layout.headline(
        figure, sheet, title(summary), subtitle(race), notes(summary, race), reasons.left_out(race)
    )
    waiting = [
        (axes, draw_panel(axes, panel)) for axes, panel in zip(column.flat, found, strict=True)
    ]
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def draw_panel(axes: Axes, panel: panels.Panel) -> list[style.Label]:
    """Means, deviations and single trainings of every stage; the labels for the right edge."""
    lines = panel.lines
    style.seconds_axis(axes, lines["train_seconds"], steps=(1, 2, 5), which="x")
    axes.set_xlabel("training time")
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g} %")
    if panel.emulated:
        layout.title(axes, panel.title, 8.0, color=style.INK)
    target = 100 * lines["target_accuracy"].iloc[0]
    axes.axhline(target, color=style.INK, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    labels = []
    for stage in ladder.ordered(lines["stage"]):
        mark, of_stage = style.mark(stage), lines[lines["stage"] == stage]
        hollow = stage in ladder.NAMES_OF_PEERS
        last = of_stage[of_stage["epoch"] == of_stage["epoch"].max()]
        axes.plot(
            last["train_seconds"],
            last["percent"],
            linestyle="none",
            marker=".",
            markersize=4,
            color=mark.color,
            alpha=0.5,
            zorder=2,
        )
        epochs = of_stage.groupby("epoch")
        seconds, middle = epochs["train_seconds"].mean(), epochs["percent"].mean()
        axes.errorbar(
            seconds,
            middle,
            epochs["percent"].std().fillna(0),
            color=mark.color,
            linewidth=2,
            linestyle=":" if hollow else (0, (4, 2)) if panel.emulated else "-",
            capsize=3.5,
            marker=mark.marker,
            markersize=8,
            markeredgewidth=1.6,
            markeredgecolor=mark.color,
            markerfacecolor="white" if hollow else mark.color,
            elinewidth=1.3,
            zorder=3,
        )
        reached = f"{middle.iloc[-1]:.2f} %, {wording.duration(seconds.iloc[-1])}"
        text = f"{wording.title(stage)}  {reached}"
        labels.append(style.Label(axes.get_xlim()[1], middle.iloc[-1], text, mark.color))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, target - 0.1), max(high, target + 0.1))
    return labels


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
        f"{first['stage']} recognises {100 * first['accuracy_mean']:.2f} % of the test images "
        f"after {wording.duration(first['train_seconds_mean'])} of training"
    )
    if len(ranked) > 1:
        next_one = ranked.iloc[1]
        text += f", {next_one['stage']} after {wording.duration(next_one['train_seconds_mean'])}"
    return text + (f" ({wording.EMULATED})" if first["device_kind"] == "emulated" else "")


def subtitle(race: pd.DataFrame) -> str:
    """Network, devices, recipe and how many seeds."""
    first = race.iloc[0]
    count = race.groupby(["stage", "device"])["seed"].nunique().max()
    what = wording.what(first["dataset"], first["network"])
    epochs = race["epoch"].max()
    return (
        f"{what}; {panels.devices(race)}\nbatch {first['batch_size']}, {epochs} epochs; mean over "
        f"{count} {'seed' if count == 1 else 'seeds'}, bars: standard deviation of one seed"
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
    hollow = ["hollow marks, dotted: the same training by other libraries"] if peers else []
    return "; ".join([*said, *hollow])
