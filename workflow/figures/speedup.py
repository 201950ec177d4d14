"""What each stage gains: over the stage before, and against the best library.

Left: the time of an epoch at one batch size, a row a stage on a logarithmic axis, with what it
gains over the row above and its share of the arithmetic that the machine can do; grey rows are
libraries. Right: how many times as fast as the best library in float32 each stage is at every batch
size (above 1 it is faster), with the test accuracy that the training reaches above; batch sizes
that learn too little in these epochs are shaded, and the number beside a line is that of the
largest that is not. Without libraries the first stage is what is compared with. Bars are 95 %
bootstrap intervals over the repeats. Hollow marks of stages were timed on part of an epoch and
scaled.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import frames, ladder, layout, panels, reasons, shading, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("ladder", "epochs")

WIDTH = 6.0
"""Inches that a panel's title may be wide."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Two panels for each data set and network.

    Emulated stages have no gain: beside measured ones they are named, and no more.
    """
    rungs = tables["ladder"]
    emulated = rungs["device_kind"] == "emulated"
    checked = [] if emulated.all() else ladder.ordered(rungs.loc[emulated, "stage"])
    rungs = rungs[~emulated] if checked else rungs
    parts = panels.on_a_page(panels.split(rungs), sheet)
    many = len(parts) >= layout.MANY
    heights = [max(3.4 if many else 4.3, 0.36 * rows_of(panel) + 0.9) for panel in parts]
    figure = pyplot.figure(figsize=sheet.size(14.6, 1.7 + sum(heights)), layout="constrained")
    grid = figure.subplots(
        len(parts), 2, squeeze=False, width_ratios=(1.12, 1), height_ratios=heights
    )
    words = layout.headline(
        figure,
        sheet,
        title(rungs),
        subtitle(rungs),
        notes(rungs, checked),
        reasons.left_out(tables["epochs"]),
    )
    waiting = []
    for (left, right), panel in zip(grid, parts, strict=True):
        draw_ladder(left, panel, sheet.compact)
        waiting.append((right, draw_compared(right, panel)))
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def at_one_size(panel: panels.Panel) -> pd.DataFrame:
    """The panel's lines at the batch size of the left part, as on the ladder."""
    return panel.lines[panel.lines["batch_size"] == shading.usual(panel.lines)]


def rows_of(panel: panels.Panel) -> int:
    """Rows of the left part."""
    return len(at_one_size(panel))


def draw_ladder(axes: Axes, panel: panels.Panel, few: bool) -> None:
    """A row for each stage with its time, its gain and its share of the peak.

    With little room there are two of the libraries: `few`.
    """
    lines = at_one_size(panel)
    lines = panels.two_libraries(lines, "epoch_seconds") if few else lines
    size = lines["batch_size"].iloc[0]
    good = lines[lines["epoch_seconds"].notna()]
    style.seconds_axis(
        axes, [*good["epoch_seconds"], *good["epoch_seconds_high"].dropna()], which="x"
    )
    low, high = axes.get_xlim()
    axes.set_xlim(low, high)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(False, axis="y")
    layout.title(axes, f"An epoch at batch {size}: {panel.title}", WIDTH, color=style.INK)
    axes.set_xlabel(f"time of an epoch{shading.reached(lines)}")
    names = [label for _, label, _ in panels.by_stage(lines)]
    axes.set_yticks(range(len(names)), names, fontsize=10.5, color=style.INK)
    for row, (stage, _, group) in enumerate(panels.by_stage(lines)):
        line = group.iloc[0]
        if line["epoch_seconds"] != line["epoch_seconds"]:
            text = wording.status(line["status"])
            axes.annotate(text, (0.01, row), xycoords=axes.get_yaxis_transform(), **QUIETLY)
            continue
        hollow = bool(line["extrapolated"]) or stage in ladder.NAMES_OF_PEERS
        own = style.label(line["epoch_seconds"], row, "", stage, panel.emulated, hollow)
        # the mark lies at the end of its bar
        axes.plot(
            [low, own.x], [row, row], color=own.color, linestyle=own.dashes, linewidth=1.6, zorder=2
        )
        style.chip(axes, (own.x, own.x), row, own)
        axes.annotate(
            described(line),
            (own.x, row),
            xytext=(9, 0),
            textcoords="offset points",
            **QUIETLY | {"color": style.INK},
        )


QUIETLY: dict[str, Any] = {
    "va": "center",
    "fontsize": 9.5,
    "color": style.QUIET,
    "annotation_clip": False,
}


def described(line: pd.Series) -> str:
    """`18.0 ms   4.4× ring, 2.1 % of peak`."""
    said = [wording.duration(line["epoch_seconds"]) + (" *" if line["extrapolated"] else "")]
    more = []
    if line["gain"] == line["gain"]:
        more.append(f"{wording.times(line['gain'])} {wording.said(line['before'])}")
    if line["stage"] == line["library"]:
        more.append("the best library")
    if line["share"] == line["share"] and line["stage"] not in ladder.NAMES_OF_PEERS:
        more.append(f"{wording.digits(100 * line['share'], 2)} % of peak")
    return "   ".join([*said, ", ".join(more)]).rstrip()


def against(lines: pd.DataFrame) -> tuple[str, str, str, str]:
    """Column, its interval's ends, and in words what the lines are compared with."""
    if lines["library_ratio"].notna().any():
        return "library_ratio", "library_ratio_low", "library_ratio_high", "the best library"
    base = next((name for name in lines["baseline"] if isinstance(name, str) and name), "")
    return "speedup", "speedup_low", "speedup_high", wording.said(base) if base else "stage 1"


def draw_compared(axes: Axes, panel: panels.Panel) -> list[style.Label]:
    """How many times as fast as the best library each stage is; the labels for the right edge."""
    value, low, high, what = against(panel.lines)
    lines = panel.lines
    if value == "library_ratio":
        own = ~lines["stage"].isin(ladder.NAMES_OF_PEERS)
        best = lines[lines["stage"] == best_coarse(lines)]
        # a stage on another device than the libraries' would take most of the panel's height
        devices = set(lines.loc[~own & lines["epoch_seconds"].notna(), "device"])
        beside = lines[own & lines["device"].isin(devices)]
        lines = pd.concat([beside if len(beside) else lines[own], best])
    sizes = sorted(set(panel.lines["batch_size"]))
    style.batch_axis(axes, sizes)
    style.times_axis(axes, pd.concat([lines[name] for name in (value, low, high)]).dropna())
    axes.axhline(1, color=style.INK, linewidth=1, zorder=1)
    layout.title(axes, f"Times as fast as {what}", WIDTH, color=style.INK, pad=20)
    labels = []
    for stage, label, group in panels.by_stage(lines):
        panels.draw_line(axes, group, stage, value, low, high, panel.emulated)
        values = group.set_index("batch_size")[value].dropna()
        if len(values):
            text = panels.end_label(label, values, wording.times, shading.largest(panel.lines))
            labels.append(style.label(sizes[-1], values.iloc[-1], text, stage, panel.emulated))
    labels += panels.draw_failures(axes, lines)
    shading.shade(axes, panel.lines)
    return labels


def best_coarse(lines: pd.DataFrame) -> str:
    """The library in lower precision that is fastest at most batch sizes; "" if there is none."""
    coarse = set(ladder.NAMES_OF_PEERS) - set(ladder.exact_peers())
    rows = lines[lines["stage"].isin(coarse) & lines["library_ratio"].notna()]
    if not len(rows):
        return ""
    wins = rows.loc[rows.groupby("batch_size")["library_ratio"].idxmax(), "stage"]
    return str(wins.mode().iloc[0])


def title(rungs: pd.DataFrame) -> str:
    """The last stage of the ladder against the stage before and the best library."""
    measured = rungs[(rungs["device_kind"] != "emulated") & rungs["epoch_seconds"].notna()]
    own = ladder.own_rows(measured)
    own = own[~own["stage"].isin(ladder.NAMES_OF_PEERS)]
    if not len(own):
        return "Time of an epoch by each stage"
    first = own[(own[["dataset", "network"]] == own[["dataset", "network"]].iloc[0]).all(axis=1)]
    rows = first[first["batch_size"] == shading.usual(first)]
    best = rows.nsmallest(1, "epoch_seconds").iloc[0]
    network = wording.NETWORKS.get(best["network"], best["network"])
    text = (
        f"{wording.said(best['stage'])} trains an epoch of {network} in "
        f"{wording.duration(best['epoch_seconds'])} at batch {best['batch_size']}"
    )
    more = []
    if best["library_ratio"] == best["library_ratio"]:
        library = f"{wording.said(best['library'])}, the best library"
        more.append(f"{wording.times(best['library_ratio'])} as fast as {library}")
    if best["gain"] == best["gain"]:
        before = f"{wording.times(best['gain'])} as fast as {wording.said(best['before'])}"
        more.insert(0, before)
    return ": ".join([text, *([" and ".join(more)] if more else [])])


def subtitle(rungs: pd.DataFrame) -> str:
    """The devices; what is counted, and how."""
    bars = ", bars: 95 % bootstrap interval over repeats" if rungs["repeats"].max() > 1 else ""
    return f"{panels.devices(rungs)}\nmedian of {panels.count(rungs)}{bars}"


def notes(rungs: pd.DataFrame, checked: Sequence[str]) -> str:
    """What is scaled, what is shaded, what was only checked, and the first stage in one number."""
    said = [panels.notes(rungs), shading.note(rungs)]
    if checked:
        names = ", ".join(map(wording.said, checked))
        said.append(f"Emulated, so checked and without times: {names}.")
    for _, rows in frames.groups(rungs, ["dataset", "network"]):
        own = rows[rows["stage"].isin(ladder.image_by_image()) & rows["epoch_seconds"].notna()]
        fast = rows[rows["batch_size"] == shading.usual(rows)]
        fast = fast[fast["speedup"].notna() & (fast["device_kind"] != "emulated")]
        if not len(fast) or fast["batch_size"].iloc[0] not in set(own["batch_size"]):
            continue
        best = fast.nlargest(1, "speedup").iloc[0]
        one = own[own["batch_size"] == best["batch_size"]].iloc[0]
        said.append(
            f"{wording.said(one['stage'])} takes one image at a time, as long at every batch size: "
            f"{panels.with_interval(one)} an epoch, pooled from {one['n']} timings. "
            f"{wording.said(best['stage'])} is {wording.times(best['speedup'])} as fast at batch "
            f"{best['batch_size']}."
        )
        break
    if rungs["share"].notna().any():
        said.append("Peak: what the probes measured of float32 on the same cores or GPU.")
    return " ".join(filter(None, said))
