"""How many times faster than stage 1 each stage trains, at every batch size.

Every point is the median epoch of stage 1 divided by that of the stage, at the same batch size, on
a logarithmic axis; bars are 95 % bootstrap intervals over the repeats. Hollow marks were timed on
part of an epoch and scaled to a whole one. Points below the line at 1 are slower than stage 1.
"""

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("summary", "epochs")


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """One panel a data set and network; emulated stages have one of their own."""
    summary = tables["summary"]
    parts = panels.on_a_page(panels.split(summary), sheet)
    if len(parts) < layout.MANY:
        figure, grid = pyplot.subplots(
            1,
            len(parts),
            figsize=sheet.size(2.6 + 6.2 * len(parts), 5.7),
            squeeze=False,
            layout="constrained",
        )
        row, width, named = list(grid[0]), 6.0, grid[0][:1]
    else:
        small = layout.small_panels(
            sheet, [panel.title for panel in parts], [3.7] * len(parts), panels.names(summary)
        )
        figure, width = small.figure, small.width
        row = [figure.add_subplot(place) for place in small.places]
        named = row[:: small.across]
    words = layout.headline(
        figure,
        sheet,
        title(summary),
        subtitle(summary),
        panels.notes(summary),
        reasons.left_out(tables["epochs"]),
    )
    values = pd.concat([summary["speedup"], summary["speedup_low"], summary["speedup_high"]])
    waiting = []
    for axes, panel in zip(row, parts, strict=True):
        waiting.append((axes, draw_panel(axes, panel, values, width)))
    for axes in named:
        axes.set_ylabel(f"times faster than {baseline(summary)}")
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def draw_panel(
    axes: Axes, panel: panels.Panel, values: pd.Series, width: float
) -> list[style.Label]:
    """The speedups of one panel's stages, `width` inches wide; the labels for its right edge."""
    sizes = sorted(set(panel.lines["batch_size"]))
    style.batch_axis(axes, sizes)
    style.times_axis(axes, values.dropna())
    axes.axhspan(axes.get_ylim()[0], 1, color="#f6ecec", zorder=0, linewidth=0)
    axes.axhline(1, color="#9a9a9a", linewidth=1, zorder=1)
    layout.title(axes, panel.title, width, color=style.INK)
    labels = []
    for stage, label, group in panels.by_stage(panel.lines):
        panels.draw_line(
            axes, group, stage, "speedup", "speedup_low", "speedup_high", panel.emulated
        )
        ends = group[group["speedup"].notna()]
        if len(ends):
            last = ends.iloc[-1]
            written = wording.times(last["speedup"])
            text = panels.end_label(label, written, last["batch_size"], sizes)
            labels.append(style.Label(sizes[-1], last["speedup"], text, style.mark(stage).color))
    return [*labels, *panels.draw_failures(axes, panel.lines)]


def baseline(summary: pd.DataFrame) -> str:
    """The stage that speedups are over, and whether its times were scaled."""
    names = [name for name in dict.fromkeys(summary["baseline"].dropna()) if name]
    scaled = " (extrapolated)" if summary["baseline_extrapolated"].any() else ""
    return " or ".join(names) + scaled


def title(summary: pd.DataFrame) -> str:
    """The result in one sentence: the fastest stage that was measured, against the baseline."""
    measured = summary[(summary["device_kind"] != "emulated") & summary["speedup"].notna()]
    measured = measured[measured["stage"] != measured["baseline"]]
    if not len(measured):
        return "Speedup of each stage over the first"
    best = measured.nlargest(1, "speedup").iloc[0]
    network = wording.NETWORKS.get(best["network"], best["network"])
    if best["speedup"] <= 1:
        return f"No stage trains {network} faster than {best['baseline']}"
    return (
        f"{best['stage']} trains {network} {wording.times(best['speedup'])} faster than "
        f"{best['baseline']} at batch {best['batch_size']}"
    )


def subtitle(summary: pd.DataFrame) -> str:
    """The devices; what is counted, and how."""
    bars = ", bars: 95 % bootstrap interval over repeats" if summary["repeats"].max() > 1 else ""
    return f"{panels.devices(summary)}\nmedian of {panels.count(summary)}{bars}"
