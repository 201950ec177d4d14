"""How much energy an epoch costs, and how hard the GPU works for it.

Left: energy of one epoch against the batch size, from the GPU's own counter while it trained
without a pause; median and quartiles over the repeats. Right: the mean power during that time,
beside the power of the idle GPU before the run. The host and the rest of the machine are not
included.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from workflow.plotting import ladder, layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("energy", "epochs")


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Energy an epoch on the left, power on the right, a line a stage."""
    energy = tables["energy"]
    energy = energy[(energy["status"] == "ok") & (energy["images"] > 0)]
    cell = panels.first_cell(energy)
    if cell is None:
        return layout.nothing(
            sheet,
            "Energy was not measured",
            "It takes a GPU whose driver reports it (NVML).",
            reasons.left_out(tables["epochs"]),
        )
    what = panels.named(cell, energy)
    energy = panels.of_cell(energy, cell).copy()
    epochs = panels.of_cell(tables["epochs"], cell)
    whole = epochs.loc[~epochs["extrapolated"], ["batch_size", "images"]].drop_duplicates()
    energy = energy.merge(
        whole.groupby("batch_size", as_index=False)["images"].max(),
        on="batch_size",
        suffixes=("", "_an_epoch"),
    )
    energy["epoch_joules"] = energy["energy_joules"] / energy["images"] * energy["images_an_epoch"]
    energy["watts"] = energy["energy_joules"] / energy["window_seconds"]
    if not len(energy):
        return layout.nothing(
            sheet, "Energy was not measured", "No stage has trained a whole epoch."
        )
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=sheet.size(14.0, 5.8), layout="constrained"
    )
    words = layout.headline(
        figure, sheet, title(energy), subtitle(energy, what), left_out=reasons.left_out(epochs)
    )
    style.quantity_axis(left, "y", energy["epoch_joules"], joules, steps=(1, 2, 5))
    left.set_ylabel("energy of an epoch")
    idle = energy["idle_watts"].median()
    right.set_ylim(0, energy["watts"].max() * 1.15)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g} W")
    right.set_ylabel("mean power while training")
    waiting = [
        (left, lines(left, energy, "epoch_joules", joules)),
        (right, lines(right, energy, "watts", lambda value: f"{value:.0f} W")),
    ]
    if np.isfinite(idle):
        right.axhline(idle, color=style.INK, linewidth=1.2, linestyle=(0, (1, 2)))
        last = energy["batch_size"].max()
        waiting[1][1].append(style.Label(last, idle, f"idle  {idle:.0f} W", style.INK))
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def lines(
    axes: Axes, energy: pd.DataFrame, value: str, write: Callable[[float], str]
) -> list[style.Label]:
    """One quantity by batch size, a line a stage; the labels for the right edge."""
    sizes = sorted(set(energy["batch_size"]))
    style.batch_axis(axes, sizes)
    labels = []
    for stage in ladder.ordered(energy["stage"]):
        mark = style.mark(stage)
        group = energy[energy["stage"] == stage]
        middle = panels.spread_line(axes, group, "batch_size", value, mark, emulated=False)
        text = panels.end_label(
            wording.title(stage), write(middle.iloc[-1]), middle.index[-1], sizes
        )
        labels.append(style.Label(sizes[-1], middle.iloc[-1], text, mark.color))
    return labels


def joules(value: float) -> str:
    """Joules, or kilojoules, to two digits."""
    if value >= 995:
        return f"{wording.digits(value / 1e3, 2)} kJ"
    return f"{wording.digits(value, 2)} J"


def title(energy: pd.DataFrame) -> str:
    """The result in one sentence: the least and the most energy that an epoch takes."""
    middle = energy.groupby(["stage", "batch_size"])["epoch_joules"].median()
    least: Any = middle.idxmin()
    most: Any = middle.idxmax()
    (stage, size), (worst, at) = least, most
    text = f"{stage} trains an epoch with {joules(middle.min())} at batch {size}"
    if len(middle) == 1:
        return text
    return f"{text}; {worst} at batch {at} takes {joules(middle.max())}"


def subtitle(energy: pd.DataFrame, what: str) -> str:
    """Network, device; what is counted, and how."""
    names = "; ".join(dict.fromkeys(map(wording.device, energy["device"])))
    seconds = energy["window_seconds"].median()
    return (
        f"{what}; {names}\nby the GPU's energy counter over {seconds:.2g} s of "
        f"training; median of {panels.repeats(energy)}, bars: quartiles"
    )
