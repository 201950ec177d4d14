"""The accuracy beside every speed: above each batch size, with a shade where it is low."""

from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from cnnlib.measuring.runs import usual_size
from workflow.plotting import accuracies, frames, style

SHADE = "#eeeeee"


def usual(lines: pd.DataFrame) -> int:
    """The batch size for what is shown at one only: the usual one of those that learn."""
    learned = accuracies.of_learned(lines)
    return usual_size(learned["batch_size"] if len(learned) else lines["batch_size"])


def largest(lines: pd.DataFrame) -> int:
    """The largest of the batch sizes that learn: the one whose numbers are written at lines."""
    learned = accuracies.of_learned(lines)
    return int((learned if len(learned) else lines)["batch_size"].max())


def shade(axes: Axes, lines: pd.DataFrame, few: bool = False) -> None:
    """Write each batch size's accuracy above a panel with a batch_axis, and shade what is low.

    Where some are shaded, the batch size of the numbers beside the lines is written above these.
    `lines` are those of one data set and network. With little room only the first, the middle and
    the last accuracy are written: `few`.
    """
    found, learned = accuracies.by_batch(lines), accuracies.learned(lines)
    sizes = sorted(key[2] for key in learned)
    if not found:
        return
    if (size := largest(lines)) < sizes[-1]:
        # above the labels at the right edge
        axes.annotate(
            f"at batch {size}",
            (1, 1),
            xytext=(22, 3),
            xycoords="axes fraction",
            textcoords="offset points",
            va="bottom",
            fontsize=9,
            color=style.QUIET,
            annotation_clip=False,
        )
    low, high = axes.get_xlim()
    edges = [low, *(float(np.sqrt(a * b)) for a, b in pairwise(sizes)), high]
    known = {key[2]: value for key, value in found.items()}
    for (*_, size), fine in sorted(learned.items(), key=lambda entry: entry[0][2]):
        place = sizes.index(size)
        if not fine:
            axes.axvspan(edges[place], edges[place + 1], color=SHADE, linewidth=0, zorder=0)
        # every second one where there are many
        apart = len(sizes) // 2 if few else 1 if len(sizes) < 11 else 2
        if size in known and (len(sizes) - 1 - place) % max(1, apart) == 0:
            axes.annotate(
                f"{100 * known[size]:.0f} %" if len(sizes) > 5 else f"{100 * known[size]:.1f} %",
                (size, 1),
                xytext=(0, 3),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9,
                color=style.QUIET,
            )


def reached(lines: pd.DataFrame) -> str:
    """`, 98.5 % recognised after 2 epochs`: what lines of one batch size reach, or nothing."""
    found = list(accuracies.by_batch(lines).values())
    if not found:
        return ""
    return f" ({100 * found[0]:.1f} % recognised after {accuracies.epochs(lines)})"


def note(lines: pd.DataFrame) -> str:
    """What the numbers above the panels are, and what is shaded."""
    found, learned = accuracies.by_batch(lines), accuracies.learned(lines)
    if not found:
        return ""
    trained = accuracies.epochs(lines)
    text = f"Above: test accuracy after {trained}, median of the stages."
    if not all(learned.values()):
        most = 100 * accuracies.WITHIN
        text += f" Shaded: learns too little in {trained}, {most:g} point or more below the best."
        cells = frames.groups(lines, ["dataset", "network"])
        sizes = {largest(own) for _, own in cells}
        which = f"batch {sizes.pop()}, " if len(sizes) == 1 else ""
        text += f" Numbers beside the lines: {which}the largest that learns."
    return text
