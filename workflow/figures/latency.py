"""How long one training step and one epoch take, against the batch size.

Left: the latency of a single step, as the median with bars from the 5 % to the 95 % quantile.
Right: a whole epoch, as the median with quartiles. All axes are logarithmic. Hollow marks were
timed on part of an epoch and scaled to a whole one.
"""

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("summary", "epochs")

QUANTITIES = (
    ("step_seconds", "step_seconds_q05", "step_seconds_q95", "One step"),
    ("epoch_seconds", "epoch_seconds_q25", "epoch_seconds_q75", "One epoch"),
)
TITLE = 6.0
"""Inches that a panel's title may be wide."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Two panels, of the step and of the epoch; emulated stages have a row of their own."""
    summary = tables["summary"]
    parts = panels.on_a_page(panels.split(summary), sheet)
    each = 4.4 if len(parts) < layout.MANY else 3.5
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
        panels.notes(summary),
        reasons.left_out(tables["epochs"]),
    )
    waiting = []
    for row, panel in zip(grid, parts, strict=True):
        for axes, quantity in zip(row, QUANTITIES, strict=True):
            waiting.append((axes, draw_panel(axes, panel, summary, *quantity)))
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def draw_panel(
    axes: Axes,
    panel: panels.Panel,
    summary: pd.DataFrame,
    value: str,
    low: str,
    high: str,
    name: str,
) -> list[style.Label]:
    """One quantity of one panel's stages; the labels for its right edge."""
    sizes = sorted(set(panel.lines["batch_size"]))
    style.batch_axis(axes, sizes)
    style.seconds_axis(axes, pd.concat([summary[value], summary[low], summary[high]]).dropna())
    layout.title(axes, f"{name}, {panel.title}", TITLE, color=style.INK)
    axes.set_ylabel("step latency" if value == "step_seconds" else "epoch time")
    labels = []
    for stage, label, group in panels.by_stage(panel.lines):
        panels.draw_line(axes, group, stage, value, low, high, panel.emulated)
        ends = group[group[value].notna()]
        if len(ends):
            last, at = ends[[value, "batch_size"]].iloc[-1]
            text = panels.end_label(label, wording.duration(last), int(at), sizes)
            labels.append(style.Label(sizes[-1], last, text, style.mark(stage).color))
    return [*labels, *panels.draw_failures(axes, panel.lines)]


def title(summary: pd.DataFrame) -> str:
    """The result in one sentence: the shortest measured epoch, and what it is against stage 1's."""
    measured = summary[(summary["device_kind"] != "emulated") & summary["epoch_seconds"].notna()]
    if not len(measured):
        return "Time of a step and of an epoch"
    best = measured.nsmallest(1, "epoch_seconds").iloc[0]
    base = measured[
        (measured["stage"] == best["baseline"])
        & (measured["batch_size"] == best["batch_size"])
        & (measured["network"] == best["network"])
        & (measured["dataset"] == best["dataset"])
    ]
    fast = (
        f"{best['stage']} trains an epoch in {wording.duration(best['epoch_seconds'])} "
        f"at batch {best['batch_size']}"
    )
    if best["stage"] == best["baseline"] or not len(base):
        return fast
    slow = wording.duration(base["epoch_seconds"].iloc[0])
    return f"{fast}; {best['baseline']} needs {slow}"


def subtitle(summary: pd.DataFrame) -> str:
    """The devices; what is counted, and how."""
    steps = summary.loc[summary["steps_timed"] > 0, "steps_timed"]
    timed = f"{steps.min()} to {steps.max()}" if len(steps) else "no"
    if len(steps) and steps.min() == steps.max():
        timed = str(steps.min())
    return (
        f"{panels.devices(summary)}\n"
        f"step: median of {timed} steps, bars: 5 % to 95 %; "
        f"epoch: median of {panels.count(summary)}, bars: quartiles"
    )
