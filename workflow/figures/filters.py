"""What the first layer has learned to look for, and what a trained network makes of one image.

Above: the weights of every filter of the first convolution, all on one scale, white for zero. Where
they are orange, ink raises the answer; where they are purple, it lowers it: a filter with both
sides answers to an edge. The words below a filter say which, from the middle of its positive and of
its negative weights. Below: a test image and its maps after each convolution with its activation
and after each subsampling; each map ranges from dark (its smallest value) to light (its largest),
so it is light where its filter has found what it looks for. The network was trained by stage gemm.
Other stages run the same training, but rounding drives their weights apart in the course of it.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from workflow.plotting import frames, layout, panels, style
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("features",)

MOST = 16
"""Filters and maps shown of a layer."""


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """A row of filters, the image, a row of maps a layer."""
    features = tables["features"]
    cell = panels.first_cell(features)
    if cell is None:
        return layout.nothing(
            sheet,
            "There are no filters to show",
            "No network of the sweep begins with a convolution.",
        )
    what = panels.named(cell, features)
    features = panels.of_cell(features, cell)
    found = pictures(features[features["kind"] == "filter"])
    image = pictures(features[features["kind"] == "image"])
    maps = features[features["kind"] == "map"]
    rows: list[tuple[str, list[np.ndarray], bool]] = [
        (f"filters of {name}", group, True) for name, group in found.items()
    ]
    rows += [("the image", group, False) for group in image.values()]
    rows += [(name, group, False) for name, group in pictures(maps).items()]
    across = min(MOST, max(len(group) for _, group, _ in rows))
    # where few maps are to be shown, they are larger: each below the filter that made it
    wide = [len(group) <= across // 2 for _, group, _ in rows]
    heights = [1.7 if each else 0.9 for each in wide]
    figure = pyplot.figure(figsize=sheet.size(12.6, 1.5 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(
        len(rows), 3, width_ratios=[1.7, across, 0.25], height_ratios=heights
    )
    words = layout.headline(figure, sheet, title(found), subtitle(features, what))
    bound = max((np.abs(picture).max() for group in found.values() for picture in group), default=1)
    for row, (name, group, signed) in enumerate(rows):
        head = figure.add_subplot(grid[row, 0])
        head.axis("off")
        size = "x".join(map(str, group[0].shape))
        head.annotate(
            f"{name}\n{len(group)} of {size}",
            (1, 0.5),
            ha="right",
            va="center",
            fontsize=9.5,
            color=style.QUIET,
        )
        places = grid[row, 1].subgridspec(1, across // 2 if wide[row] else across)
        for column, picture in enumerate(group[:across]):
            axes = figure.add_subplot(places[0, column])
            shown = show(axes, picture, bound if signed else None)
            if signed:
                axes.set_xlabel(seen(picture), fontsize=9, color=style.INK, labelpad=2)
        if signed:
            bar = figure.colorbar(shown, cax=figure.add_subplot(grid[row, 2]))
            bar.set_ticks([-bound, 0, bound], labels=[f"−{bound:.2g}", "0", f"{bound:.2g}"])
            bar.ax.tick_params(labelsize=8)
            bar.outline.set_visible(False)
    return Drawing(figure, words)


def pictures(features: pd.DataFrame) -> dict[str, list[np.ndarray]]:
    """Layer -> its arrays (rows, columns), one a map and source."""
    found: dict[str, list[np.ndarray]] = {}
    for (layer, _, _), group in frames.groups(features, ["layer", "map", "source"]):
        shape = group["row"].max() + 1, group["column"].max() + 1
        picture = np.zeros(shape)
        picture[group["row"], group["column"]] = group["value"]
        found.setdefault(str(layer), []).append(picture)
    return found


def show(axes: Axes, picture: np.ndarray, bound: float | None) -> AxesImage:
    """One small picture without ticks; signed ones from blue to orange."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if bound is None:
        return axes.imshow(picture, cmap="gray", interpolation="nearest")
    return axes.imshow(picture, cmap="PuOr_r", vmin=-bound, vmax=bound, interpolation="nearest")


EDGE = 0.2
"""Distance of the middles of positive and negative weights in an edge, over a filter's side."""
SIDES = (("right", "left"), ("below", "above"))


def sides(picture: np.ndarray) -> list[str]:
    """On which sides of a filter its positive weights lie: none, one, or two for a corner."""
    height, width = picture.shape
    positive, negative = picture.clip(min=0), (-picture).clip(min=0)
    if not positive.sum() or not negative.sum():
        return []
    found = []
    for axis, extent in ((1, width), (0, height)):
        places = np.arange(extent)
        middles = [(each.sum(axis=1 - axis) @ places) / each.sum() for each in (positive, negative)]
        found.append((middles[0] - middles[1]) / extent)
    largest = max(map(abs, found))
    if largest < EDGE:
        return []
    # a side counts beside the other one if it is not far weaker
    return [
        SIDES[which][0 if apart > 0 else 1]
        for which, apart in enumerate(found)
        if abs(apart) >= max(EDGE, 0.5 * largest)
    ]


def seen(picture: np.ndarray) -> str:
    """What raises the answer of a filter: `ink above left`."""
    found = sides(picture)
    if found:
        return f"ink {' '.join(reversed(found))}"
    return "no clear side"


def title(found: dict[str, list[np.ndarray]]) -> str:
    """How many of the filters answer to edges, in one sentence."""
    for name, group in found.items():
        height, width = group[0].shape
        edges = sum(bool(sides(picture)) for picture in group)
        what = f"{edges} of the {len(group)} filters of {height}x{width} of {name}"
        return f"{what} look for an edge: ink on one side, none on the other"
    return "What the network makes of an image"


def subtitle(features: pd.DataFrame, what: str) -> str:
    """Network, how it was trained."""
    first = features.iloc[0]
    return (
        f"{what}; trained by {first['stage']}, batch {first['batch_size']}, "
        f"seed {first['seed']}\nbelow the filters: a test image and its maps, layer by layer"
    )
