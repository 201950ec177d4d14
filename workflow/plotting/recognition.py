"""What the stages know at which moment, completed where a stage was only timed, as a grid.

Every validated stage runs the same training, whose course differs by rounding alone. So what a slow
stage will know after some number of images is taken from a quick stage. The moment of every row is
the number of images seen, times the stage's time per image in whole timed epochs: a training that
is stopped to be looked at runs up to 1.7 times as slow, and says nothing about how fast a stage is.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch, Rectangle

from cnnlib.measuring.runs import usual_size
from workflow.plotting import (
    contrast,
    frames,
    ladder,
    layout,
    panels,
    reasons,
    style,
    timings,
    wording,
)

RUN = ["dataset", "network", "batch_size", "seed"]
LINE = ["stage", "device", "device_kind"]
Line = tuple[str, str, str]
"""The values of LINE."""

SURE = 0.5
"""Probability from which on an image counts as recognised."""
NO_ROWS = (
    "No predictions were recorded",
    "No run of the sweep was evaluated on single images while it trained.",
)
BLOCKS = 3
SMALLER = 0.8
"""Size of the words in the cells of a page with little room."""
MOST_LETTERS = 9
"""Letters of a class's name in a cell."""
CELL_INCHES, CELL_WIDE, GAP_INCHES, PICTURE_INCHES = 0.52, 0.86, 0.40, 1.0
MARKS, NAMES = -0.018, -0.036
"""Where the mark and the name of a row are, as shares of the width of the cells."""
NOT_YET = "#e9e9e9"
SHADES = {
    right: LinearSegmentedColormap.from_list(name, ["#ffffff", color])
    for right, name, color in ((True, "right", "#0072b2"), (False, "wrong", "#d55e00"))
}


# stages that were only timed --------------------------------------------------------------------


def paces(epochs: pd.DataFrame) -> pd.DataFrame:
    """Median seconds per image of each RUN and LINE, from its own timed epochs.

    Runs timed in full show how many images an epoch has; without any the table is empty.
    """
    good = epochs[(epochs["status"] == "ok") & epochs["validated"] & (epochs["epoch_seconds"] > 0)]
    images = timings.epoch_images(good)
    found = []
    place = ["dataset", "network", "batch_size"]
    times = timings.repeats(good, [*place, *LINE])
    for key, rows in frames.groups(good, [*place, *LINE]):
        count = images(key[0], key[2])
        if count == count:
            pace = float(np.median(np.concatenate(times[key]))) / count
            line = dict(zip([*place, *LINE], key, strict=True)) | {"pace": pace}
            found += [line | {"seed": seed} for seed in dict.fromkeys(rows["seed"])]
    return pd.DataFrame(found, columns=[*RUN, *LINE, "pace"])


def complete(rows: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Rows of `learning` or `predictions`, with every line as long as the longest of its run.

    `train_seconds` is the time that the images take by the stage's own timed epochs, as far as
    there are any. New columns: `borrowed`, where a row is another stage's (its name: `source`);
    `whole`, where the line ends with the training, not because its time was up.
    """
    rows = rows[(rows["status"] == "ok") & rows["validated"]]
    known = paces(epochs)
    diverged = epochs[epochs["status"] == "diverged"]
    lost = set(diverged[[*RUN, *LINE]].itertuples(index=False, name=None))
    parts = [rows.iloc[:0].assign(borrowed=False, source="", whole=False)]
    for run, group in frames.groups(rows, RUN):
        own: dict[Line, pd.DataFrame] = dict(frames.groups(group, LINE))
        longest = max(own.values(), key=lambda line: line["images"].max())
        end = longest["images"].max()
        ended = not longest["extrapolated"].any()
        of_run = known[(known[RUN] == list(run)).all(axis=1)]
        pace: dict[Line, float] = {
            (row.stage, row.device, row.device_kind): row.pace for row in frames.rows(of_run)
        }
        for key in in_order({*own, *pace}):
            line = own.get(key, longest.iloc[:0])
            seen = line["images"].max() if len(line) else -1
            stays = (*run, *key) not in lost
            if key in pace:
                line = line.assign(train_seconds=line["images"] * pace[key])
            parts.append(line.assign(borrowed=False, source="", whole=ended and stays))
            if seen < end and stays and key in pace:
                rest = longest[longest["images"] > seen]
                seconds = rest["images"] * pace[key]
                source = longest["stage"].iloc[0]
                taken = {"train_seconds": seconds, "borrowed": True, "source": source}
                parts.append(rest.assign(**dict(zip(LINE, key, strict=True)), **taken, whole=ended))
            elif seen < end:
                parts[-1]["whole"] = False
    return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)


def in_order(lines: Iterable[Line]) -> list[Line]:
    """(stage, device, kind) along the ladder, those that were measured before emulated ones."""
    lines = sorted(lines)
    order = ladder.ordered(stage for stage, _, _ in lines)
    return sorted(lines, key=lambda line: (line[2] == "emulated", order.index(line[0])))


def one_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the first data set and network, of the usual batch size and the first seed."""
    cell = panels.first_cell(rows)
    if cell is None:
        return rows
    rows = panels.of_cell(rows, cell)
    rows = rows[rows["batch_size"] == usual_size(rows["batch_size"])]
    first: pd.DataFrame = rows[rows["seed"] == rows["seed"].min()]
    return first


def left_out(predictions: pd.DataFrame, epochs: pd.DataFrame) -> str:
    """Why stages of the ladder have no row among those of the data set and network shown."""
    return reasons.left_out(
        ladder.own_rows(epochs), panels.first_cell(ladder.own_rows(predictions))
    )


# beliefs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Belief:
    """The class that a stage predicts for an image, and its probability."""

    label: int
    chance: float
    right: bool
    borrowed: bool = False
    name: str = ""
    """What the class is called; "": by its number."""

    @property
    def text(self) -> str:
        """The name as it fits into a cell, or the number."""
        if len(self.name) <= MOST_LETTERS:
            return self.name or str(self.label)
        return f"{self.name[: MOST_LETTERS - 1]}…"


def beliefs(predictions: pd.DataFrame) -> pd.DataFrame:
    """Rows of `predictions` with `chances` (an array), `belief` and `chance`; without those of nan.

    The network before its first batch knows nothing and is left out.
    """
    chances = [np.array(text.split(), dtype=float) for text in predictions["probabilities"]]
    known = [len(each) > 0 and bool(np.isfinite(each).all()) for each in chances]
    shown = np.array(known, dtype=bool) & (predictions["images"] > 0).to_numpy()
    kept = [each for each, show in zip(chances, shown, strict=True) if show]
    return predictions[shown].assign(
        chances=pd.Series(kept, predictions.index[shown], dtype=object),
        belief=[int(each.argmax()) for each in kept],
        chance=[float(each.max()) for each in kept],
    )


def belief_of(row: pd.Series) -> Belief:
    """The belief in one of these rows."""
    borrowed, name = bool(row.get("borrowed", False)), str(row.get("belief_name", ""))
    return Belief(row["belief"], row["chance"], row["belief"] == row["label"], borrowed, name)


def named(rows: pd.DataFrame, pictures: pd.DataFrame) -> pd.DataFrame:
    """The rows with `label_name` and `belief_name`: what classes are called, or their numbers.

    The table `pictures` has an image of each class of a data set, and its name if it has one.
    """
    known = {
        (row.dataset, row.label): row.class_name
        for row in frames.rows(pictures)
        if isinstance(row.class_name, str) and row.class_name
    }

    def names(column: str) -> list[str]:
        pairs = zip(rows["dataset"], rows[column], strict=True)
        return [known.get((dataset, label), str(label)) for dataset, label in pairs]

    return rows.assign(label_name=names("label"), belief_name=names("belief"))


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each image and moment at which several stages were evaluated.

    `same`: whether all predict one class. `apart`: the largest difference between two stages in
    the probability of a class.
    """
    found = []
    for (images, index), group in frames.groups(rows, ["images", "image_index"], sort=True):
        if len(group) > 1 and group["chances"].map(len).nunique() == 1:
            apart = float(np.ptp(np.stack(list(group["chances"])), axis=0).max())
            same = group["belief"].nunique() == 1
            found.append({"images": images, "image_index": index, "same": same, "apart": apart})
    return pd.DataFrame(found, columns=["images", "image_index", "same", "apart"])


def known_from(line: pd.DataFrame) -> pd.Series | None:
    """The row from which on the prediction is right, with SURE at least, to the end; or None."""
    good = ((line["belief"] == line["label"]) & (line["chance"] >= SURE)).to_numpy()
    if not len(good) or not good[-1]:
        return None
    doubts = np.flatnonzero(~good)
    return line.iloc[doubts[-1] + 1 if len(doubts) else 0]


def lines(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each stage and device, by images, in the order in which they are drawn."""
    found = {key: line.sort_values("images") for key, line in frames.groups(rows, LINE)}
    return [found[key] for key in in_order(found)]


def longest(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the stage and device that has seen the most images itself."""
    own = rows[~rows["borrowed"]]
    most = own.nlargest(1, "images").iloc[0]
    return own[(own[LINE] == most[LINE]).all(axis=1)]


def choose(rows: pd.DataFrame) -> list[tuple[int, str]]:
    """(image, difficulty): one recognised soon and then late ones, as far as there are any.

    Judged by the line that has seen the most images. Of late ones those come first that all lines
    recognise in the end: there one sees when a stage's prediction tips. One that is never
    recognised is shown if there is room.
    """
    moments: dict[int, float] = {}
    for index, line in frames.groups(longest(rows), "image_index"):
        known = known_from(line.sort_values("images"))
        moments[index] = math.inf if known is None else known["images"]
    learned = sorted(
        (index for index in moments if moments[index] < math.inf), key=moments.__getitem__
    )
    never = [index for index in moments if moments[index] == math.inf]
    found = [(index, "easy") for index in learned[:1]]
    late = learned[:0:-1]
    late.sort(key=lambda index: not by_all(rows[rows["image_index"] == index]))
    late = sorted(late[: BLOCKS - len(found)], key=moments.__getitem__)
    found += [(index, "hard") for index in late]
    found += [(index, "very hard") for index in never[: BLOCKS - len(found)]]
    return found[:BLOCKS]


def by_all(rows: pd.DataFrame) -> bool:
    """Whether all lines recognise an image in the end, and for good."""
    return all(known_from(line) is not None for line in lines(rows))


def after(row: pd.Series) -> str:
    """`after 12.4 min (extrapolated)`."""
    return f"after {wording.duration(row['train_seconds'])}" + (
        " (extrapolated)" if row["borrowed"] else ""
    )


def subtitle(rows: pd.DataFrame, table: pd.DataFrame) -> str:
    """Network, batch, devices; what else the table holds and is not shown."""
    first = rows.iloc[0]
    what = panels.named((first["dataset"], first["network"]), table)
    return (
        f"{what}, batch {first['batch_size']}, one training of each stage from seed "
        f"{first['seed']}\n{panels.devices(rows)}"
    )


def notes(rows: pd.DataFrame) -> str:
    """A note on how points were extrapolated, if there are any."""
    taken = rows[rows["borrowed"]]
    if not len(taken):
        return ""
    stages, sources = (
        ", ".join(map(wording.said, ladder.ordered(taken[name]))) for name in ("stage", "source")
    )
    return (
        f"Extrapolated ({stages}): timed on a part of the training. What is known after more "
        f"images is taken from {sources}, since all stages run the same training but for rounding."
    )


# the grid ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridRow:
    """A stage and its prediction in every column; None where it has none yet."""

    stage: str
    emulated: bool
    remark: str
    cells: Sequence[Belief | None]


@dataclass(frozen=True)
class Block:
    """A test image, what is written below it, and every stage's predictions."""

    picture: npt.NDArray[np.uint8] | None
    caption: str
    rows: Sequence[GridRow]


def grid_row(line: pd.DataFrame, cells: Sequence[Belief | None]) -> GridRow:
    """The row of one stage, with a remark where it was not trained in full or not on a GPU."""
    emulated = line["device_kind"].iloc[0] == "emulated"
    remarks = ["emulated"] * emulated + ["extrapolated"] * bool(line["borrowed"].any())
    return GridRow(line["stage"].iloc[0], emulated, ", ".join(remarks), cells)


def blocks(
    sheet: layout.Sheet,
    rows: pd.DataFrame,
    pictures: pd.DataFrame,
    cells: Callable[[pd.DataFrame], Sequence[Belief | None]],
) -> list[Block]:
    """A block for each chosen image; `cells` makes those of a stage from its rows of that image."""
    found = []
    for index, kind in choose(rows)[: BLOCKS - sheet.compact]:
        of_image = rows[rows["image_index"] == index]
        name, dataset = of_image[["label_name", "dataset"]].iloc[0]
        what = name if len(name) > 1 else f"a {name}"
        found.append(
            Block(
                picture_of(pictures, dataset, index),
                f"{what}, {kind}" + ("" if sheet.compact else f"\ntest image {index:,}"),
                [grid_row(line, cells(line)) for line in lines(of_image)],
            )
        )
    return found


def picture_of(pictures: pd.DataFrame, dataset: str, index: int) -> npt.NDArray[np.uint8] | None:
    """Dark on light, (height, width) or (height, width, 3); None if it is not in the table."""
    found = pictures[(pictures["dataset"] == dataset) & (pictures["image_index"] == index)]
    if not len(found):
        return None
    row = found.iloc[0]
    shape = row["channels"], row["height"], row["width"]
    pixels = np.frombuffer(bytes.fromhex(row["pixels"]), np.uint8).reshape(shape)
    if len(pixels) == 3:
        return np.moveaxis(pixels, 0, -1)
    gray: npt.NDArray[np.uint8] = (255 - pixels.mean(axis=0)).astype(np.uint8)
    return gray


def draw_grid(
    sheet: layout.Sheet,
    blocks: Sequence[Block],
    columns: Sequence[str],
    about: str,
    title: str,
    subtitle: str,
    notes: str,
    nothing: str,
    left_out: str = "",
) -> layout.Drawing:
    """Blocks below one another; `about` says what the columns are, `nothing` what no belief is, and
    `left_out` which stages have no row, and why.
    """
    inches = [max(CELL_INCHES * places(block.rows)[-1], PICTURE_INCHES) for block in blocks]
    width = 1.35 + CELL_WIDE * len(columns)
    figure = pyplot.figure(
        figsize=sheet.size(max(9.0, 2.5 + width), 2.6 + sum(inches) + GAP_INCHES * len(blocks)),
        layout="constrained",
    )
    grid = figure.add_gridspec(len(blocks), 2, width_ratios=(1.5, width), height_ratios=inches)
    words = layout.headline(figure, sheet, title, subtitle, notes, left_out)
    layout.spacing(figure, h_pad=0.08, wspace=0.0)
    for number, block in enumerate(blocks):
        draw_picture(figure.add_subplot(grid[number, 0]), block)
        axes = figure.add_subplot(grid[number, 1])
        draw_block(axes, block, columns, SMALLER if sheet.compact else 1.0)
        if not number:
            axes.set_title(about, fontsize=11, loc="left", color=style.INK, pad=8)
    cells = [cell for block in blocks for row in block.rows for cell in row.cells]
    key(axes, cells, nothing, most=3 if sheet.compact else None)
    return layout.Drawing(figure, words)


def key(axes: Axes, cells: Sequence[Belief | None], nothing: str, most: int | None) -> None:
    """A legend of the kinds of tiles that there are, below the last block."""
    beliefs = [cell for cell in cells if cell is not None]
    dashed: dict[str, Any] = {
        "facecolor": "white",
        "edgecolor": style.INK,
        "linestyle": (0, (3, 2)),
    }
    handles = [
        Patch(label=label, **look)
        for there, label, look in (
            (any(c.right for c in beliefs), "right", {"facecolor": SHADES[True](0.9)}),
            (not all(c.right for c in beliefs), "wrong ✗", {"facecolor": SHADES[False](0.9)}),
            (bool(beliefs), "paler: less sure", {"facecolor": SHADES[True](0.3)}),
            (any(c.borrowed for c in beliefs), "extrapolated", dashed),
            (None in cells, nothing, {"facecolor": NOT_YET}),
        )
        if there
    ]
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.01, 0.0),
        ncols=most or len(handles),
        frameon=False,
        fontsize=9.5,
        handlelength=1.3,
        handleheight=1.1,
        columnspacing=1.4,
        handletextpad=0.5,
        borderaxespad=0.4,
    )


def places(rows: Sequence[GridRow]) -> list[float]:
    """Where each row begins, and the last one ends; emulated stages are set a little apart."""
    found, below = [], 0.0
    for number, row in enumerate(rows):
        apart = number > 0 and row.emulated and not rows[number - 1].emulated
        found.append(below + 0.25 * apart)
        below = found[-1] + 1
    return [*found, below]


def draw_picture(axes: Axes, block: Block) -> None:
    """The image as the network sees it, framed, with its caption below."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_anchor("C")
    axes.grid(False)
    axes.spines[:].set(visible=True, color="#9a9a9a", linewidth=1.0)
    if block.picture is not None:
        axes.imshow(block.picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.set_box_aspect(1)
        axes.text(0.5, 0.5, "no picture", fontsize=9, color=style.QUIET, ha="center", va="center")
    axes.set_xlabel(block.caption, fontsize=10.5, color=style.INK, linespacing=1.35)


def draw_block(axes: Axes, block: Block, columns: Sequence[str], scale: float) -> None:
    """A row of cells for every stage, whose words are `scale` times as large as usual."""
    axes.set_xlim(0, len(columns))
    starts = places(block.rows)
    axes.set_ylim(starts[-1], 0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, fontsize=10.5)
    axes.set_yticks([])
    axes.tick_params(length=0, pad=2)
    look: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
    for down, row in zip(starts, block.rows, strict=False):
        name, own = wording.brief(wording.title(row.stage)), style.label(0, 0, "", row.stage)
        above = down + (0.36 if row.remark else 0.52)
        chip = replace(own, hollow=own.hollow or bool(row.remark))
        style.chip(axes, (MARKS, MARKS), above, chip, axes.get_yaxis_transform())
        axes.text(NAMES, above, name, fontsize=11, color=style.INK, **look)
        axes.text(NAMES, down + 0.76, row.remark, fontsize=8.5, color=style.QUIET, **look)
        for across, cell in enumerate(row.cells):
            draw_cell(axes, across, down, cell, scale)


def draw_cell(axes: Axes, across: float, down: float, cell: Belief | None, scale: float) -> None:
    """A tile, darker for a higher probability; orange with a cross where it is wrong."""
    if cell is None:
        draw_tile(axes, across, down, 0.03, facecolor=NOT_YET, linewidth=0)
        return
    depth = 0.12 + 0.88 * cell.chance  # an unsure prediction must be visible, too
    shade = SHADES[cell.right](depth)
    draw_tile(axes, across, down, 0.03, facecolor=shade, linewidth=0)
    ink = contrast.ink_on(shade)
    if cell.borrowed:
        draw_tile(axes, across, down, 0.075, fill=False, edgecolor=ink, linestyle=(0, (3, 2)))
    texts: list[tuple[float, float, str, dict[str, Any]]] = [
        (0.50, 0.40, cell.text, {"fontsize": scale * size_of(cell.text), "weight": "bold"}),
        (0.50, 0.75, f"{100 * cell.chance:.0f} %", {"fontsize": scale * 9}),
    ]
    if not cell.right:
        texts.append((0.82, 0.33, "✗", {"fontsize": scale * 10}))
    for right, below, text, look in texts:
        drawn = axes.text(
            across + right, down + below, text, color=ink, ha="center", va="center", **look
        )
        drawn.set_in_layout(False)


def size_of(text: str) -> float:
    """Points in which a class is written so that it fits into its cell."""
    return 15 if len(text) <= 2 else 11 if len(text) <= 5 else 8.5


def draw_tile(axes: Axes, across: float, down: float, margin: float, **look: Any) -> None:
    """A cell's rectangle, `margin` smaller on every side."""
    tall = margin * CELL_WIDE / CELL_INCHES
    tile = Rectangle((across + margin, down + tall), 1 - 2 * margin, 1 - 2 * tall, **look)
    axes.add_patch(tile).set_in_layout(False)
