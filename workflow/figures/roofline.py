"""How close each part of the training comes to the limits of the machine.

There is one mark for each part of the network and direction, for each stage, at one batch size. Its
horizontal position is the arithmetic needed per byte that must at least be moved; its vertical
position is the arithmetic done per second while its kernels ran. The lines are measured limits of
the machine: copying memory (slanted) and multiply-adds (level). Both counts are those of the
network, the same for every stage, so a stage that moves or multiplies more than necessary has lower
marks. Larger marks take more of a step. Marks may lie above the slanted line where data stay in a
cache. Of a CPU stage on several cores one process is timed while all work: where it waits for
slower processes, its marks are too high.
"""

import numpy as np
import pandas as pd
from matplotlib import patheffects as effects
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from workflow.plotting import ladder, layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("kernels", "probes", "epochs")

CEILINGS = {
    "cuda": (("copy_device", "memory:"), (("peak_fp32", "fp32"), ("peak_tf32", "TF32"))),
    "cpu": (
        ("copy_cpu", "memory, one thread:"),
        (("blas_all", "BLAS, all cores"), ("blas_one", "one core")),
    ),
}
PART = ["layers", "part"]
PANEL = 7.0
"""Inches of a panel's width."""


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
    size = max(kernels["batch_size"])
    marks = of_parts(kernels[kernels["batch_size"] == size])
    kinds = [kind for kind in ("cpu", "emulated", "cuda") if kind in set(marks["device_kind"])]
    if sheet.compact:
        kinds = kinds[-1:]
    figure, row = pyplot.subplots(
        1,
        len(kinds),
        figsize=sheet.size(1.2 + PANEL * len(kinds), 6.6),
        squeeze=False,
        layout="constrained",
    )
    words = layout.headline(
        figure,
        sheet,
        title(marks, tables["probes"]),
        subtitle(marks, what, size, tables["probes"]),
        left_out=reasons.left_out(tables["epochs"], cell),
    )
    named = 3 if sheet.compact else 5
    for axes, kind in zip(row.flat, kinds, strict=True):
        draw_panel(axes, marks[marks["device_kind"] == kind], tables["probes"], kind, named)
    return Drawing(figure, words)


def of_parts(kernels: pd.DataFrame) -> pd.DataFrame:
    """Seconds, flops and bytes of every part: medians over the repeats."""
    kernels = kernels.assign(seconds=kernels["launches"] * kernels["kernel_seconds"])
    keys = ["stage", "device", "device_kind", *PART]
    runs = kernels.groupby([*keys, "repeat"], sort=False).agg(
        seconds=("seconds", "sum"), flops=("flops", "first"), bytes=("bytes", "first")
    )
    marks = runs.groupby(keys, sort=False).median().reset_index()
    marks["rate"], marks["intensity"] = (
        marks["flops"] / marks["seconds"],
        marks["flops"] / marks["bytes"],
    )
    marks["share"] = marks["seconds"] / marks.groupby("stage")["seconds"].transform("sum")
    return marks


def ceilings(probes: pd.DataFrame, kind: str) -> tuple[list[tuple[str, float]], float, str]:
    """[(name, FLOP/s)], bytes/s and its name, as far as they were measured on such a device."""
    own = probes[(probes["device_kind"] == kind) & (probes["status"] == "ok")]
    (copy, name), peaks = CEILINGS.get(kind, (("", ""), ()))
    largest = own[own["probe"] == copy]
    largest = largest[largest["size_bytes"] == largest["size_bytes"].max()]
    bandwidth = largest["rate"].median() * 1e9
    found = [(text, own.loc[own["probe"] == peak, "rate"].median() * 1e12) for peak, text in peaks]
    return [(text, rate) for text, rate in found if rate == rate], bandwidth, name


def draw_panel(
    axes: Axes, marks: pd.DataFrame, probes: pd.DataFrame, kind: str, named: int
) -> None:
    """Ceilings, then the marks of each stage, those that take most named."""
    levels, bandwidth, memory = ceilings(probes, kind)
    across = np.array([marks["intensity"].min() / 3, marks["intensity"].max() * 6])
    rates = [*marks["rate"], *(rate for _, rate in levels)]
    style.quantity_axis(axes, "x", across, lambda value: f"{value:g}", steps=(1, 2, 5), margin=1.0)
    style.quantity_axis(axes, "y", rates, rate_text, margin=2.2)
    axes.set_xlabel("minimum arithmetic intensity (operations per byte)")
    axes.set_ylabel("operations per second")
    built = f" ({wording.EMULATED})" if kind == "emulated" else ""
    devices = ", ".join(dict.fromkeys(wording.device(name) for name in marks["device"]))
    layout.title(axes, devices + built, PANEL - 0.8, color=style.INK)
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
    name_marks(axes, marks, named)
    legend = axes.legend(loc="lower right", frameon=False, fontsize=9.5)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([70])


def name_marks(axes: Axes, marks: pd.DataFrame, most: int) -> None:
    """Name the `most` parts that take longest, once each, at the highest of their marks."""
    marks = marks.assign(name=marks["layers"].str.partition("+")[0] + " " + marks["part"])
    busiest = marks.groupby("name")["share"].max().nlargest(most).index
    for name in sorted(busiest):
        # Forward above its mark and backward below: both have the same intensity in a first layer.
        upward = name.endswith("forward")
        top = marks[marks["name"] == name].nlargest(1, "rate").iloc[0]
        label = axes.annotate(
            name,
            (top["intensity"], top["rate"]),
            xytext=(0, 10 if upward else -12),
            textcoords="offset points",
            ha="center",
            va="bottom" if upward else "top",
            fontsize=9,
            color=style.INK,
            zorder=5,
        )
        label.set_path_effects([effects.withStroke(linewidth=2.5, foreground="white", alpha=0.8)])


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
    name = str(best["layers"]).partition("+")[0]
    text = f"{best['stage']} reaches {rate_text(best['rate'])} in {name} {best['part']}"
    if kind == "emulated":
        text += f" ({wording.EMULATED})"
    levels, _, _ = ceilings(probes, kind)
    if not levels:
        return text
    ceiling, rate = levels[0]
    return f"{text}, {100 * best['rate'] / rate:.0f} % of the peak ({ceiling})"


def subtitle(marks: pd.DataFrame, what: str, size: int, probes: pd.DataFrame) -> str:
    """Network, batch; what is counted, and how; whether there is anything to compare with."""
    kinds = dict.fromkeys(marks["device_kind"])
    found = [ceilings(probes, kind) for kind in kinds if kind != "emulated"]
    bare = not any(levels or bandwidth == bandwidth for levels, bandwidth, _ in found)
    note = "; the machine's own limits were not measured" if bare else ""
    return (
        f"{what}, batch {size}; {panels.devices(marks)}\n"
        "each part of the layers, forward and backward; medians over the repeats; "
        f"a mark's area: its share of the stage's time{note}"
    )
