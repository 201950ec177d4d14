"""How fast errors go back through each convolution, pushed by upper units or pulled by lower ones.

There is one panel for each layer: time per image of the kernel that only propagates errors, median
and quartiles over the repeats, against the batch size; both axes are logarithmic. Push: each unit
adds its error to its inputs, with a barrier for each kernel position. Pull: each unit gathers from
the units that it feeds, with wasted reads at the border. The first convolution propagates no
errors.
"""

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import layout, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("kernels", "epochs")

WAYS = {
    "push_errors": ("push", style.mark("fused")),
    "pull_errors": ("pull", style.mark("fused_pull")),
}
STAGE = "fused"
PANEL = ["dataset", "network", "layer", "device_kind"]


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """A panel for each convolution that sends errors back, in one row a network."""
    kernels = tables["kernels"]
    times = kernels[(kernels["stage"] == STAGE) & kernels["kernel"].isin(WAYS)].copy()
    times["image_seconds"] = times["kernel_seconds"] / times["batch_size"]
    epochs = tables["epochs"]
    missing = reasons.left_out(epochs[epochs["stage"] == STAGE])
    if not len(times):
        there = "has no kernels that do" if missing else "is not in sweep.stages"
        return layout.nothing(
            sheet, "Push and pull were not measured", f"Stage '{STAGE}' {there}.", missing
        )
    groups = [group for _, group in times.groupby(PANEL, sort=False)]
    if sheet.compact:
        first = [times["dataset"].iloc[0], times["network"].iloc[0]]
        groups = [p for p in groups if [p["dataset"].iloc[0], p["network"].iloc[0]] == first][:3]
    if len(groups) < layout.MANY:
        across = len(groups)
        figure, grid = pyplot.subplots(
            1,
            across,
            figsize=sheet.size(2.4 + 6.6 * across, 1.7 + 4.4),
            squeeze=False,
            layout="constrained",
            sharey=True,
        )
        row, width = list(grid.flat), 6.2
    else:
        small = layout.small_panels(sheet, list(map(heading, groups)), [3.5] * len(groups))
        figure, width = small.figure, small.width
        row = [figure.add_subplot(place) for place in small.places]
    words = layout.headline(figure, sheet, title(times), subtitle(times), left_out=missing)
    waiting = []
    for axes, panel in zip(row, groups, strict=True):
        waiting.append((axes, draw_panel(axes, panel, times, width)))
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def heading(panel: pd.DataFrame) -> str:
    """Layer, network and data set of a panel."""
    dataset, network, layer, kind = panel[PANEL].iloc[0]
    built = f"\n({wording.EMULATED})" if kind == "emulated" else ""
    return f"{layer}, {wording.what(dataset, network)}{built}"


def draw_panel(
    axes: Axes, panel: pd.DataFrame, times: pd.DataFrame, width: float
) -> list[style.Label]:
    """Push and pull of one layer, `width` inches wide; the labels for the right edge."""
    sizes = sorted(set(panel["batch_size"]))
    style.batch_axis(axes, sizes)
    style.seconds_axis(axes, times["image_seconds"], steps=(1, 2, 5))
    kind = panel["device_kind"].iloc[0]
    layout.title(axes, heading(panel), width, color=style.INK)
    axes.set_ylabel("time per image")
    labels = []
    for kernel, (name, mark) in WAYS.items():
        by_size = panel[panel["kernel"] == kernel].groupby("batch_size")["image_seconds"]
        if not len(by_size):
            continue
        middle = by_size.median()
        low, high = middle - by_size.quantile(0.25), by_size.quantile(0.75) - middle
        axes.errorbar(
            middle.index,
            middle,
            [low, high],
            color=mark.color,
            marker=mark.marker,
            markersize=8,
            linewidth=2,
            linestyle=(0, (4, 2)) if kind == "emulated" else "-",
            elinewidth=1.3,
            capsize=3.5,
        )
        text = f"{name}  {wording.duration(middle.iloc[-1])}"
        labels.append(style.Label(sizes[-1], middle.iloc[-1], text, mark.color, mark.marker))
    return labels


def title(times: pd.DataFrame) -> str:
    """The result in one sentence: who wins at the largest batch, or that it depends."""
    medians = times.groupby([*PANEL, "batch_size", "kernel"])["kernel_seconds"].median().unstack()
    if set(medians.columns) != set(WAYS):
        return "Errors sent back: push and pull"
    gains = (medians["pull_errors"] / medians["push_errors"]).dropna()
    if (gains >= 1).all() or (gains <= 1).all():
        winner, factors = ("push", gains) if (gains >= 1).all() else ("pull", 1 / gains)
        low, high = wording.times(factors.min()), wording.times(factors.max())
        factor = low if low == high else f"{low} to {high}"
        return f"Errors go back {factor} faster when they are {winner}ed"
    return "Whether errors go back faster pushed or pulled depends on the batch"


def subtitle(times: pd.DataFrame) -> str:
    """The device; what is counted, and how."""
    devices = "; ".join(wording.device(name) for name in times["device"].unique())
    counts = times.groupby([*PANEL, "batch_size", "kernel"]).size()
    return (
        f"stage {STAGE} on {devices}\n"
        f"the kernel alone; median of {counts.min()} repeats, bars: quartiles"
    )
