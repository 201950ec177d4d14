"""What each technique of stage tuned gains: an epoch without it over an epoch with it.

A technique has a bar for each batch size, the smallest on top, from 1 (no gain) to the ratio of the
median epochs of two stages that differ in it alone; thin lines are 95 % bootstrap intervals over
the repeats. A bar to the left of 1 is a technique that costs time. The axis is logarithmic. Bars
that are missing belong to stages that have no valid times.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from workflow.plotting import layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("ablation", "epochs")
STAGES = ("graph_programmatic", "persistent")
"""Without any of these in the sweep there is no such figure."""

SHADES = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
"""Of bars, from small batches to large ones."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """A panel for each data set and network; emulated stages have one of their own."""
    gains = tables["ablation"]
    gains = gains[gains["gain"].notna()]
    missing = reasons.left_out(tables["epochs"])
    if gains.empty:
        why = "No two stages of workflow/experiments/ablation/ that differ in one were timed."
        return layout.nothing(sheet, "What each technique gains was not measured", why, missing)
    parts = panels.on_a_page(panels.split(gains), sheet)
    techniques = list(dict.fromkeys(gains["technique"]))
    figure, grid = pyplot.subplots(
        1,
        len(parts),
        figsize=sheet.size(3.6 + 4.9 * len(parts), 1.9 + 0.62 * len(techniques)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    words = layout.headline(figure, sheet, title(gains), subtitle(gains), left_out=missing)
    sizes = sorted(set(gains["batch_size"]))
    for axes, part in zip(grid[0], parts, strict=True):
        draw_panel(axes, part, techniques, sizes)
        layout.title(axes, part.title, 4.6, color=style.INK)
    if len(sizes) > 1:
        figure.legend(
            *grid[0][0].get_legend_handles_labels(),
            loc="outside lower right",
            ncols=min(3, len(sizes)),
            frameon=False,
        )
    return Drawing(figure, words)


def draw_panel(axes: Axes, part: panels.Panel, techniques: list[str], sizes: list[int]) -> None:
    """Bars of one panel; techniques and batch sizes, each with a shade, are those of all panels."""
    lines = part.lines
    height = 0.8 / len(sizes)
    for number, size in enumerate(sizes):
        of_size = lines[lines["batch_size"] == size].set_index("technique")
        places = [
            techniques.index(name) + (number - (len(sizes) - 1) / 2) * height
            for name in of_size.index
        ]
        gain = of_size["gain"].to_numpy()
        color = SHADES[round(number * (len(SHADES) - 1) / max(1, len(sizes) - 1))]
        axes.barh(places, gain - 1, height * 0.92, 1, color=color, label=f"batch {size}")
        known = of_size["gain_low"].notna().to_numpy()
        axes.hlines(
            np.array(places)[known],
            of_size["gain_low"].to_numpy()[known],
            of_size["gain_high"].to_numpy()[known],
            color=style.INK,
            linewidth=1,
            # seen on dark bars too
            path_effects=[withStroke(linewidth=2.6, foreground="white")],
        )
    reach = [*lines["gain"], *lines["gain_low"].dropna(), *lines["gain_high"].dropna(), 0.8, 1.6]
    style.quantity_axis(axes, "x", reach, wording.times, steps=(1, 1.5, 2, 3, 5, 7), margin=1.1)
    axes.axvline(1, color=style.INK, linewidth=1)
    axes.set_yticks(range(len(techniques)), techniques)
    axes.set_ylim(len(techniques) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel("epoch without it / epoch with it")


def title(gains: pd.DataFrame) -> str:
    """The result in one sentence: the largest gain that was measured."""
    measured = gains[gains["device_kind"] != "emulated"]
    if measured.empty:
        return "What each technique gains"
    best = measured.nlargest(1, "gain").iloc[0]
    what = f"{best['technique']} at batch {best['batch_size']}"
    if best["gain"] <= 1:
        return "No technique gains time"
    return f"The largest gain is {ratio(best['gain'])}: {what}"


def subtitle(gains: pd.DataFrame) -> str:
    """The devices; what is compared, and how."""
    bars = ", lines: 95 % bootstrap intervals" if gains["gain_low"].notna().any() else ""
    devices = "; ".join(dict.fromkeys(map(wording.device, gains["device"])))
    return f"{devices}\nratio of median epochs of two stages that differ in it{bars}"


def ratio(gain: float) -> str:
    """A gain to two decimal places: most are close to 1."""
    return f"{gain:.2f}×"
