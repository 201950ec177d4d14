"""How much energy an epoch costs, and how hard the GPU works for it.

Left: energy of one epoch against the batch size, from the GPU's own counter while it trained
without a pause; median and quartiles over the repeats. Right: the mean power during that time. The
band is the power just before the runs, when the GPU was waiting: with a context open it keeps high
clocks, so that a stage that lets it wait most of the time needs no more. Numbers above the panels
are test accuracies; batch sizes that learn too little are shaded, and a number beside a line is
that of the largest that is not. The host and the rest of the machine are not included.
"""

from collections.abc import Callable

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from cnnlib.measuring.runs import usual_size
from workflow.plotting import accuracies, ladder, layout, panels, reasons, shading, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("energy", "epochs")

WAITING = "#c9def3"
"""Colour of the power of a GPU that waits."""


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
    summary = accuracies.of_epochs(epochs)
    words = layout.headline(
        figure,
        sheet,
        title(energy, summary),
        subtitle(energy, what),
        " ".join(filter(None, (libraries(energy), shading.note(summary)))),
        left_out=reasons.left_out(epochs),
    )
    style.quantity_axis(left, "y", energy["epoch_joules"], joules, steps=(1, 2, 5))
    left.set_ylabel("energy of an epoch")
    right.set_ylim(0, energy["watts"].max() * 1.15)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g} W")
    right.set_ylabel("mean power while training")
    shown = panels.two_libraries(energy, "epoch_joules")
    learning = summary[summary["batch_size"].isin(energy["batch_size"])]
    large = shading.largest(learning)
    waiting = [
        (left, lines(left, shown, "epoch_joules", joules, large)),
        (right, lines(right, shown, "watts", lambda value: f"{value:.0f} W", large)),
    ]
    if energy["idle_watts"].notna().any():
        low, middle, high = energy["idle_watts"].quantile([0.05, 0.5, 0.95])
        right.axhspan(low, high, color=WAITING, linewidth=0, zorder=1)
        last = energy["batch_size"].max()
        text = f"waiting  {low:.0f} to {high:.0f} W"
        waiting[1][1].append(style.Label(last, middle, text, WAITING))
    for axes in (left, right):
        shading.shade(axes, learning, few=sheet.compact)
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def lines(
    axes: Axes, energy: pd.DataFrame, value: str, write: Callable[[float], str], large: int
) -> list[style.Label]:
    """One quantity by batch size, a line a stage; labels for the right edge, of batch `large`."""
    sizes = sorted(set(energy["batch_size"]))
    style.batch_axis(axes, sizes)
    labels = []
    for stage in ladder.ordered(energy["stage"]):
        group = energy[energy["stage"] == stage]
        middle = panels.spread_line(
            axes, group, "batch_size", value, style.mark(stage), emulated=False
        )
        text = panels.end_label(wording.title(stage), middle, write, large)
        labels.append(style.label(sizes[-1], middle.iloc[-1], text, stage))
    return labels


def joules(value: float) -> str:
    """Joules, or kilojoules, to two digits."""
    if value >= 995:
        return f"{wording.digits(value / 1e3, 2)} kJ"
    return f"{wording.digits(value, 2)} J"


def title(energy: pd.DataFrame, summary: pd.DataFrame) -> str:
    """The least and the most energy that an epoch takes, at one batch size that learns."""
    stages = energy.groupby("batch_size")["stage"].nunique()
    learned = set(accuracies.of_learned(summary)["batch_size"])
    fine = stages[stages.index.isin(learned)] if learned.intersection(stages.index) else stages
    # where a stage was not measured, another would be said to take least
    size = usual_size(fine.index[fine == fine.max()])
    at = energy[energy["batch_size"] == size]
    need = at.groupby("stage")["epoch_joules"].median().sort_values(kind="stable")
    text = f"At batch {size} an epoch takes {wording.said(need.index[0])} {joules(need.iloc[0])}"
    exact = [stage for stage in need.index if stage in ladder.exact_peers()]
    best = exact[0] if exact else need.index[-1]
    if best == need.index[0]:
        return text
    which = ", the most frugal library in float32," if exact else ""
    return f"{text}, {wording.said(best)}{which} {joules(need[best])}"


def libraries(energy: pd.DataFrame) -> str:
    """Which of the libraries have a line."""
    count = energy.loc[energy["stage"].isin(ladder.NAMES_OF_PEERS), "stage"].nunique()
    if count < 3:
        return ""
    return "Grey, with dashes: the libraries in float32 that need least and most."


def subtitle(energy: pd.DataFrame, what: str) -> str:
    """Network, device; what is counted, and how."""
    names = "; ".join(dict.fromkeys(map(wording.device, energy["device"])))
    seconds = energy["window_seconds"].median()
    return (
        f"{what}; {names}\nby the GPU's energy counter over {seconds:.2g} s of "
        f"training; median of {panels.repeats(energy)}, bars: quartiles"
    )
