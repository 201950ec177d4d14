"""How close the training comes to the limits of the machine.

On a GPU there is one mark for each part of the network and direction, for each stage, at the
largest batch size that learns. Its horizontal position is the arithmetic needed per byte that must
at least be moved; its vertical position is the arithmetic done per second while its kernels ran. On
a CPU, where only one of several processes is timed part by part, there is one mark for the whole
step. The lines are measured limits of the machine: copying memory (slanted) and multiply-adds
(level), on as many cores as the stage has; how fast all cores copy together was not measured.
Counts are those of the network, the same for every stage, so a stage that moves or multiplies more
than necessary has lower marks. Larger marks take more of a step. Marks may lie above the slanted
line where data stay in a cache.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from workflow.plotting import (
    accuracies,
    ladder,
    layout,
    panels,
    reasons,
    style,
    wording,
)
from workflow.plotting.layout import Drawing, Sheet
from workflow.plotting.rooflines import ceilings, of_parts, of_steps

TABLES = ("kernels", "probes", "epochs")

KINDS = ("one core", "cpu", "emulated", "cuda")
PANEL = 7.6
"""Inches of the width of a panel with many marks."""
CLOSE = 1.14
"""Parts whose intensities lie within this factor have one name."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """A panel for each kind of device."""
    kernels = tables["kernels"]
    kernels = kernels[(kernels["status"] == "ok") & (kernels["launches"] > 0)]
    kernels = kernels[kernels["kernel_seconds"] > 0]
    kernels = kernels[kernels["part"].isin(["forward", "backward"]) & (kernels["flops"] > 0)]
    cell = panels.first_cell(kernels)
    if cell is None:
        return layout.nothing(
            sheet,
            "There is no roofline to draw",
            "There are no kernels with arithmetic in the table.",
            reasons.left_out(tables["epochs"]),
        )
    what = panels.named(cell, kernels)
    kernels = panels.of_cell(kernels, cell)
    epochs = panels.of_cell(tables["epochs"], cell)
    size = largest_learned(kernels, epochs)
    kernels = kernels[kernels["batch_size"] == size]
    on_cpu = kernels["device_kind"] == "cpu"
    parts = [
        part
        for part in (of_parts(kernels[~on_cpu]), of_steps(kernels[on_cpu], epochs))
        if len(part)
    ]
    if not parts:
        return layout.nothing(
            sheet,
            "There is no roofline to draw",
            "No whole epoch was timed.",
            reasons.left_out(epochs),
        )
    marks = pd.concat(parts, ignore_index=True)
    kinds = [kind for kind in KINDS if kind in set(marks["panel"])]
    if "cuda" in kinds or sheet.compact:
        kinds = kinds[-1:]  # a mark alone says no more than the notes do
    wide = [1.0 if kind in ("one core", "cpu") and len(kinds) > 1 else 2.0 for kind in kinds]
    figure, row = pyplot.subplots(
        1,
        len(kinds),
        figsize=sheet.size(1.2 + max(9.6, PANEL * sum(wide) / 2), 6.8),
        squeeze=False,
        width_ratios=wide,
        layout="constrained",
    )
    words = layout.headline(
        figure,
        sheet,
        title(marks, tables["probes"]),
        subtitle(marks, what, size, tables["probes"]),
        notes(marks[~marks["panel"].isin(kinds)], tables["probes"]),
        left_out=reasons.left_out(tables["epochs"], cell),
    )
    for axes, kind, share in zip(row.flat, kinds, wide, strict=True):
        own = marks[marks["panel"] == kind]
        foot = 1.5 if sheet.compact else 0.3
        draw_panel(axes, own, tables["probes"], kind, PANEL * share / 2 - 1.7, foot)
    return Drawing(figure, words)


def largest_learned(kernels: pd.DataFrame, epochs: pd.DataFrame) -> int:
    """The largest batch size that was profiled and learns."""
    sizes = set(kernels["batch_size"])
    learned = accuracies.of_learned(accuracies.of_epochs(epochs))
    return int(max(sizes & set(learned["batch_size"]) or sizes))


def draw_panel(
    axes: Axes, marks: pd.DataFrame, probes: pd.DataFrame, kind: str, width: float, foot: float
) -> None:
    """Ceilings, then the marks of each stage, and the names of the parts below them.

    `foot` is the height left for these names, in heights of what is drawn above.
    """
    levels, bandwidth, memory = ceilings(probes, kind)
    across = np.array([marks["intensity"].min() / 3, marks["intensity"].max() * 6])
    rates = [*marks["rate"], *(rate for _, rate in levels)]
    style.quantity_axis(axes, "x", across, lambda value: f"{value:g}", steps=(1, 2, 5), margin=1.0)
    style.quantity_axis(axes, "y", rates, rate_text, margin=2.2)
    if kind in ("cuda", "emulated"):  # room for the names of the parts
        low, top = axes.get_ylim()
        axes.set_ylim(low * (low / top) ** foot, top)
    axes.set_xlabel("minimum arithmetic intensity (operations per byte)")
    axes.set_ylabel("operations per second")
    built = f" ({wording.EMULATED})" if kind == "emulated" else ""
    devices = ", ".join(dict.fromkeys(wording.device(name) for name in marks["device"]))
    layout.title(axes, devices + built, width, color=style.INK)
    highest = max((rate for _, rate in levels), default=np.inf)
    if bandwidth == bandwidth:
        slope = np.minimum(across * bandwidth, highest)
        corner = np.array([across[0], min(highest / bandwidth, across[1]), across[1]])
        axes.plot(corner, np.minimum(corner * bandwidth, highest), color=style.QUIET, linewidth=1.2)
        if axes.get_ylim()[0] < slope[0]:
            axes.annotate(
                f"{memory} {bandwidth / 1e9:,.0f} GB/s",
                (across[0], slope[0]),
                xytext=(16, -2),
                textcoords="offset points",
                fontsize=9,
                color=style.QUIET,
                va="top",
            )
    for text, rate in levels:
        start = rate / bandwidth if bandwidth == bandwidth else across[0]
        axes.plot(
            [max(start, across[0]), across[1]], [rate, rate], color=style.QUIET, linewidth=1.2
        )
        axes.annotate(
            f"{text}  {rate_text(rate)}",
            (across[1], rate),
            xytext=(-4, 4),
            ha="right",
            textcoords="offset points",
            fontsize=9,
            color=style.QUIET,
        )
    for stage in ladder.ordered(marks["stage"]):
        group, mark = marks[marks["stage"] == stage], style.mark(stage)
        axes.scatter(
            group["intensity"],
            group["rate"],
            s=30 + 420 * group["share"],
            marker=mark.marker,
            color=mark.color,
            alpha=0.75,
            edgecolor="white",
            linewidth=0.8,
            zorder=3,
            label=wording.title(stage),
        )
    if kind in ("cuda", "emulated"):
        name_parts(axes, marks)
    legend = axes.legend(loc="lower right", frameon=False, fontsize=9.5, labelcolor=style.INK)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([70])


def name_parts(axes: Axes, marks: pd.DataFrame) -> None:
    """The names of the last stage's parts at the lower edge, where lines lead to their marks."""
    last = marks[marks["stage"] == ladder.ordered(marks["stage"])[-1]].sort_values("intensity")
    groups: list[list[tuple[str, str, float]]] = []
    for layers, part, at in zip(last["layers"], last["part"], last["intensity"], strict=True):
        if not groups or at > CLOSE * groups[-1][0][2]:
            groups.append([])
        groups[-1].append((str(layers).partition("+")[0], str(part), float(at)))
    for group in groups:
        names: dict[str, list[str]] = {}
        for layer, part, _ in group:
            names.setdefault(layer, []).append(part)
        text = ", ".join(
            layer if len(parts) > 1 else f"{layer} {parts[0]}" for layer, parts in names.items()
        )
        middle = float(np.exp(np.mean([np.log(at) for *_, at in group])))
        axes.axvline(middle, color=style.GRID, linewidth=1.0, zorder=0)
        axes.annotate(
            text,
            (middle, 0.012),
            xycoords=axes.get_xaxis_transform(),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=style.INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            zorder=1,
        )
    axes.grid(False, axis="x")


def rate_text(value: float) -> str:
    """Operations per second in a fitting unit."""
    for unit, name in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1e3, "kFLOP/s")):
        if value >= 0.9995 * unit:
            return f"{float(f'{value / unit:.3g}'):g} {name}"
    return f"{value:g} FLOP/s"


def title(marks: pd.DataFrame, probes: pd.DataFrame) -> str:
    """The highest rate in one sentence, and its share of the machine's peak."""
    kind = next(k for k in ("cuda", "cpu", "emulated") if k in set(marks["device_kind"]))
    own = marks[marks["device_kind"] == kind]
    best = own.nlargest(1, "rate").iloc[0]
    place = " ".join(filter(None, (str(best["layers"]).partition("+")[0], str(best["part"]))))
    text = f"{wording.said(best['stage'])} reaches {rate_text(best['rate'])} in {place}"
    if kind == "emulated":
        text += f" ({wording.EMULATED})"
    levels, _, _ = ceilings(probes, str(best["panel"]))
    if not levels:
        return text
    ceiling, rate = levels[0]
    return f"{text}, {100 * best['rate'] / rate:.0f} % of the peak ({ceiling})"


def notes(marks: pd.DataFrame, probes: pd.DataFrame) -> str:
    """In words what stages reach that have no panel here: of each the whole step."""
    said = []
    for _, mark in marks.iterrows():
        levels, _, _ = ceilings(probes, str(mark["panel"]))
        text = f"{wording.said(mark['stage'])} reaches {rate_text(mark['rate'])}"
        if levels:
            name, rate = levels[0]
            text += f", {wording.digits(100 * mark['rate'] / rate, 2)} % of {name}"
        said.append(text)
    return f"On the CPU, over the whole step: {'; '.join(said)}." if said else ""


def subtitle(marks: pd.DataFrame, what: str, size: int, probes: pd.DataFrame) -> str:
    """Network, batch; what is counted, and how; whether there is anything to compare with."""
    kinds = dict.fromkeys(marks["panel"])
    found = [ceilings(probes, kind) for kind in kinds if kind != "emulated"]
    bare = not any(levels or bandwidth == bandwidth for levels, bandwidth, _ in found)
    note = "; the machine's own limits were not measured" if bare else ""
    return (
        f"{what}, batch {size}; {panels.devices(marks)}\n"
        "each part of the layers, forward and backward, medians over the repeats; "
        f"a mark's area: its share of the stage's time{note}"
    )
