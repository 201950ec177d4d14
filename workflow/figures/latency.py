"""How long one training step and one epoch take, against the batch size.

Left: a step, which is the time of an epoch divided by its steps, so that whatever belongs to it is
counted. Right: a whole epoch. Both are medians with 95 % bootstrap intervals over the repeats, on
logarithmic axes, beside the quickest and the slowest library in float32. A single step that the
host waits for takes longer than either: it pays for the way to the GPU and back each time. The
numbers above are test accuracies; batch sizes that learn too little in these epochs are shaded, and
a number beside a line is that of the largest that is not. An epoch has whole batches only.
Hollow marks of stages were timed on part of an epoch and scaled to a whole one.
"""

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import accuracies, layout, panels, reasons, shading, style, wording
from workflow.plotting.layout import Drawing, Sheet
from workflow.plotting.timings import epoch_images

TABLES = ("summary", "epochs")

QUANTITIES = (("epoch_step", "One step"), ("epoch_seconds", "One epoch"))
TITLE = 6.0
"""Inches that a panel's title may be wide."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Two panels, of the step and of the epoch; emulated stages have a row of their own."""
    summary = with_steps(tables["summary"], tables["epochs"])
    parts = panels.on_a_page(panels.split(summary), sheet)
    each = 4.6 if len(parts) < layout.MANY else 3.7
    longest = f"{QUANTITIES[1][-1]}, {max((panel.title for panel in parts), key=len)}"
    each += layout.TITLE_LINE * max(0, layout.wrapped(longest, TITLE, 11).count("\n") - 1)
    figure, grid = pyplot.subplots(
        len(parts),
        2,
        figsize=sheet.size(14.0, 1.5 + each * len(parts)),
        squeeze=False,
        layout="constrained",
    )
    words = layout.headline(
        figure,
        sheet,
        title(summary),
        subtitle(summary),
        " ".join(filter(None, (panels.notes(summary), shading.note(summary)))),
        reasons.left_out(tables["epochs"]),
    )
    waiting = []
    for row, panel in zip(grid, parts, strict=True):
        for axes, quantity in zip(row, QUANTITIES, strict=True):
            waiting.append((axes, draw_panel(axes, panel, summary, *quantity)))
            shading.shade(axes, panel.lines, few=sheet.compact)
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def with_steps(summary: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """The summary with the time of an epoch and its interval divided by the steps of an epoch.

    Epochs that were timed in full show how many images an epoch has; with none of them there are no
    steps to divide by, and these columns hold nothing.
    """
    images = epoch_images(epochs)
    counts = [
        images(dataset, size) / size
        for dataset, size in zip(summary["dataset"], summary["batch_size"], strict=True)
    ]
    return summary.assign(
        **{
            f"epoch_step{end}": summary[f"epoch_seconds{end}"] / counts
            for end in ("", "_low", "_high")
        }
    )


def draw_panel(
    axes: Axes, panel: panels.Panel, summary: pd.DataFrame, value: str, name: str
) -> list[style.Label]:
    """One quantity of one panel's stages; the labels for its right edge."""
    lines = panels.two_libraries(panel.lines, "epoch_seconds")
    sizes = sorted(set(panel.lines["batch_size"]))
    style.batch_axis(axes, sizes)
    columns = value, f"{value}_low", f"{value}_high"
    style.seconds_axis(axes, pd.concat([summary[column] for column in columns]).dropna())
    layout.title(axes, f"{name}, {panel.title}", TITLE, color=style.INK, pad=20)
    axes.set_ylabel("time of a step" if value == "epoch_step" else "time of an epoch")
    labels = []
    for stage, label, group in panels.by_stage(lines):
        panels.draw_line(axes, group, stage, *columns, panel.emulated)
        ends = group[group[value].notna()]
        if len(ends):
            values = ends.set_index("batch_size")[value]
            text = panels.end_label(label, values, wording.duration, shading.largest(panel.lines))
            scaled = bool(ends["extrapolated"].all())
            last = values.iloc[-1]
            labels.append(style.label(sizes[-1], last, text, stage, panel.emulated, scaled))
    labels += panels.draw_failures(axes, lines)
    return labels


def title(summary: pd.DataFrame) -> str:
    """The result in one sentence: the shortest epoch at a batch size that learns, and its step."""
    measured = summary[(summary["device_kind"] != "emulated") & summary["epoch_seconds"].notna()]
    if not len(measured):
        return "Time of a step and of an epoch"
    best = accuracies.of_learned(measured).nsmallest(1, "epoch_seconds").iloc[0]
    fast = (
        f"{wording.said(best['stage'])} trains an epoch in "
        f"{wording.duration(best['epoch_seconds'])} at batch {best['batch_size']}"
    )
    if best["epoch_step"] == best["epoch_step"]:
        fast += f", {wording.duration(best['epoch_step'])} a step"
    base = measured[
        (measured["stage"] == best["baseline"])
        & (measured["batch_size"] == best["batch_size"])
        & (measured["network"] == best["network"])
        & (measured["dataset"] == best["dataset"])
    ]
    if best["stage"] == best["baseline"] or not len(base):
        return fast
    slow = wording.duration(base["epoch_seconds"].iloc[0])
    return f"{fast}; {wording.said(best['baseline'])} needs {slow} an epoch"


def subtitle(summary: pd.DataFrame) -> str:
    """The devices; what is counted, and how."""
    return (
        f"{panels.devices(summary)}\n"
        f"median of {panels.count(summary)}, bars: 95 % bootstrap interval over repeats; "
        "a step: an epoch divided by its steps"
    )
