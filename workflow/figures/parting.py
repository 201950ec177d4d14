"""How far correct trainings drift apart: one training by several stages, compared as it goes on.

All stages start from the same weights and train on the same batches in the same order. Above is the
largest difference between two stages in a probability that they give to a test image, below the
largest difference between their test accuracies, by the number of images trained on, with a line
for each batch size. In the grey strips there is no visible difference; there the height of a mark
only keeps the lines apart.

The stages add the same float32 numbers in different orders, which changes the last bits of a
weight. Training enlarges that difference step by step, and abruptly where a relu or a maximum
decides otherwise. So no stage can be judged by its weights at the end of a whole training: correct
ones differ, too. A row is validated by single steps, which are compared with a reference, and by a
replay of the timed calls, which is compared bit by bit where a stage is deterministic
(cnnlib/validation/trajectory.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from workflow.plotting import frames, ladder, layout, panels, reasons, recognition, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("predictions", "learning", "epochs")

ROUNDED = 1.5e-4
"""Probabilities have four decimals: a difference of one in the last may be theirs alone."""
FEW = 5
"""Batch sizes whose lines have colours and labels, at most."""
MARKERS = "osD^v"
STRIP = 0.2
"""Share of a panel's height where no difference can be seen."""
OTHERS = "#b4b4b4"
"""Colour of the lines without a label."""

Lines = dict[int, pd.Series]
"""The largest difference at each number of images, by batch size."""


@dataclass(frozen=True)
class Part:
    """A quantity that is compared between stages, and up to where it counts as equal."""

    lines: Lines
    equal: float
    what: str
    same: str
    write: Callable[[float], str]

    @property
    def largest(self) -> float:
        """The largest of all differences."""
        return max((float(line.max()) for line in self.lines.values()), default=0.0)

    @property
    def parted(self) -> dict[int, int]:
        """Images after which a difference was first visible, for batch sizes that have one."""
        visible = {size: line[line > self.equal] for size, line in self.lines.items()}
        return {size: int(line.index[0]) for size, line in visible.items() if len(line)}

    @property
    def together(self) -> list[int]:
        """Images up to which there was no visible difference, for each batch size in order."""
        parted = self.parted
        before = [
            line.index[line.index < parted.get(size, np.inf)] for size, line in self.lines.items()
        ]
        return [int(images.max()) if len(images) else 0 for images in before]


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Two panels by images trained on: probabilities above, test accuracies below."""
    predictions, learning = (compared(tables[name]) for name in ("predictions", "learning"))
    epochs = ladder.own_rows(tables["epochs"])
    cell = panels.first_cell(predictions, learning)
    left_out = reasons.left_out(epochs, cell)
    if cell is None:
        return layout.nothing(sheet, *recognition.NO_ROWS, left_out)
    predictions, learning = (panels.of_cell(rows, cell) for rows in (predictions, learning))
    parts = probabilities(predictions), accuracy(learning)
    sizes = sorted({size for part in parts for size in part.lines})
    if not sizes:
        return layout.nothing(
            sheet,
            "No two stages can be compared",
            "At no batch size were two of them evaluated after the same images.",
            left_out,
        )
    seen = pd.concat([rows for rows in (predictions, learning) if len(rows)])
    seen = seen[seen["batch_size"].isin(sizes)]
    shown = few(sizes, (parts[0] if parts[0].lines else parts[1]).parted)
    every = pd.concat([tables[name] for name in ("predictions", "learning") if len(tables[name])])
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=sheet.size(9.5, 9.0), sharex=True, layout="constrained"
    )
    words = layout.headline(
        figure,
        sheet,
        title(seen, *parts),
        subtitle(seen, every, cell),
        notes(seen, shown, predictions, learning),
        left_out,
    )
    waiting = [
        (axes, draw_part(axes, part, looks(shown)))
        for axes, part in zip((above, below), parts, strict=True)
    ]
    images_axis(below, seen["images"])
    style.end_labels(figure, waiting)
    return Drawing(figure, words)


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of float32 stages of the ladder that are validated, from the first seed and repeat.

    Without those from before the first step, where all networks are one.
    """
    good = ladder.own_rows(rows[(rows["status"] == "ok") & rows["validated"]])
    # products that are rounded to fewer bits than float32 has differ at once
    coarse = {stage.name for stage in ladder.known() if stage.rounding is not None}
    good = good[(good["images"] > 0) & ~good["stage"].isin(coarse)]
    good = good[good["seed"] == good["seed"].min()]
    first: pd.DataFrame = good[good["repeat"] == good["repeat"].min()]
    return first


def probabilities(predictions: pd.DataFrame) -> Part:
    """Largest differences of probabilities, over all watched images and classes."""
    lines = {}
    for size, rows in frames.groups(recognition.beliefs(predictions), "batch_size", sort=True):
        found = recognition.compare(rows)
        if len(found):
            lines[size] = found.groupby("images")["apart"].max().round(6)
    return Part(
        lines,
        ROUNDED,
        "largest difference of a probability\nbetween two stages",
        "the same to four decimals",
        lambda value: wording.digits(value, 2),
    )


def accuracy(learning: pd.DataFrame) -> Part:
    """Largest differences of test accuracies, in percentage points."""
    good = learning[learning["test_accuracy"].notna() & (learning["test_images"] > 0)]
    lines = {}
    for size, rows in frames.groups(good, "batch_size", sort=True):
        moments = (100 * rows["test_accuracy"]).groupby(rows["images"])
        apart = (moments.max() - moments.min())[moments.count() > 1].round(6)
        if len(apart):
            lines[size] = apart
    image = 100 / good["test_images"].max() if len(good) else 1.0
    return Part(
        lines,
        image / 2,
        "largest difference of test accuracy\nbetween two stages (% points)",
        "the same accuracy",
        lambda value: "1 point" if value == 1 else f"{value:.3g} points",
    )


def few(sizes: list[int], parted: Mapping[int, int]) -> list[int]:
    """Up to FEW batch sizes, from end to end, with the one where stages first differ."""
    places = np.linspace(0, len(sizes) - 1, min(FEW, len(sizes))).round().astype(int)
    found = [sizes[place] for place in places]
    first = min(parted, key=lambda size: (parted[size], size not in found), default=found[0])
    if first not in found:
        nearest = min(found[1:-1], key=lambda size: abs(np.log(size / first)))
        found[found.index(nearest)] = first
    return sorted(found)


def looks(sizes: list[int]) -> dict[int, style.Mark]:
    """Return marks from dark to light by batch size, in colours fit for colour-blind readers."""
    shades = np.linspace(0.0, 0.68, len(sizes))
    return {
        size: style.Mark(to_hex(colormaps["viridis"](shade)), marker)
        for size, shade, marker in zip(sizes, shades, MARKERS, strict=False)
    }


def draw_part(axes: Axes, part: Part, marks: Mapping[int, style.Mark]) -> list[style.Label]:
    """A line for each batch size above a strip for what is equal; labels for the right edge."""
    axes.set_ylabel(part.what)
    highest = max(part.largest, 10 * part.equal)
    style.quantity_axis(axes, "y", [part.equal, highest], lambda value: f"{value:,g}")
    top = axes.get_ylim()[1]
    bottom = part.equal / (top / part.equal) ** (STRIP / (1 - STRIP))
    axes.set_ylim(bottom, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if part.equal < tick <= top])
    axes.axhspan(bottom, part.equal, color=style.GRID, linewidth=0, zorder=0)
    place: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 10, "color": style.QUIET}
    if not part.lines:
        axes.text(0.5, 0.6, "not evaluated by two stages", ha="center", **place)
        return []
    axes.text(0.012, STRIP + 0.02, f"grey: {part.same}", va="bottom", **place)
    for size in sorted({*part.lines} - {*marks}):
        line = part.lines[size].clip(lower=part.equal)
        axes.plot(line.index, line, color=OTHERS, linewidth=0.9, zorder=2)
    labels = []
    for number, (size, mark) in enumerate(marks.items()):
        if size not in part.lines:
            continue
        line = part.lines[size]
        share = (number + 1) / (len(marks) + 1)
        level = bottom * (part.equal / bottom) ** share
        heights = line.where(line > part.equal, level)
        axes.plot(
            line.index,
            heights,
            color=mark.color,
            marker=mark.marker,
            markersize=7,
            linewidth=1.8,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=3,
        )
        last = part.write(line.iloc[-1]) if line.iloc[-1] > part.equal else "the same"
        text = f"batch {size:,}: {last}"
        labels.append(style.Label(line.index[-1], heights.iloc[-1], text, mark.color, mark.marker))
    return labels


def images_axis(axes: Axes, images: pd.Series) -> None:
    """Numbers of images on a logarithmic axis."""
    narrow = images.max() < 100 * images.min()
    style.quantity_axis(
        axes, "x", images, lambda value: f"{value:,.0f}", (1, 2, 5) if narrow else (1,), 1.25
    )
    axes.set_xlabel("images trained on")


def title(seen: pd.DataFrame, beliefs: Part, accuracies: Part) -> str:
    """Up to how many images there is no visible difference, and how large it becomes."""
    names = list(dict.fromkeys(seen["stage"]))
    by = f"by {len(names)} stages" if len(names) > 1 else f"by {names[0]} on several devices"
    apart = beliefs if beliefs.lines else accuracies
    how = "to four decimals" if beliefs.lines else "in accuracy"
    least, most = min(apart.together), max(apart.together)
    images = f"{most:,} images" if least in (0, most) else f"{least:,} to {most:,} images"
    if not apart.parted:
        return f"Correct trainings {by} agree {how} for {images}, as far as they were compared"
    if not most:
        text = f"Correct trainings {by} drift apart within {min(apart.parted.values()):,} images"
    else:
        up_to = "" if least else "up to "
        text = f"Correct trainings {by} agree {how} for {up_to}{images}, then drift apart"
    if accuracies.largest > accuracies.equal:
        return f"{text}: test accuracies differ by up to {accuracies.write(accuracies.largest)}"
    return f"{text}: probabilities differ by up to {apart.write(apart.largest)}"


def subtitle(seen: pd.DataFrame, every: pd.DataFrame, cell: tuple[str, str]) -> str:
    """Network and devices; what is the same for all stages."""
    return (
        f"{panels.named(cell, every)}, one training of each stage from seed {seen['seed'].min()}\n"
        f"{panels.devices(seen)}\n"
        "the same initial weights, the same batches in the same order, float32"
    )


def notes(
    seen: pd.DataFrame, shown: list[int], predictions: pd.DataFrame, learning: pd.DataFrame
) -> str:
    """Over how many images; batch sizes without a label; stages with fewer points than others."""
    said = []
    if others := sorted(set(seen["batch_size"]) - {*shown}):
        said.append(f"Thin lines: batch {', '.join(f'{size:,}' for size in others)}.")
    if count := predictions["image_index"].nunique():
        what = f"{count} test image{'' if count == 1 else 's'}"
        said.append(
            f"Probabilities of all classes for {what}, written to four decimals; 1 in the last is "
            "no difference."
        )
    if len(learning):
        numbers = ", ".join(f"{count:,}" for count in sorted(set(learning["test_images"])))
        said.append(f"Accuracy over the first {numbers} test images.")
    ends = seen.groupby(["stage", "batch_size"])["images"].max().unstack()
    if short := ladder.ordered(ends.index[(ends < ends.max()).any(axis=1)]):
        said.append(f"Not evaluated to the end: {', '.join(short)}.")
    return " ".join(said)
