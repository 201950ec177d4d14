"""What the first layer has learned to look for, and what a trained network makes of one image.

Above: the weights of every filter of the first convolution, all on one scale, white for zero.
Below: a test image and its maps after each convolution with its activation and after each
subsampling; each map ranges from dark (its smallest value) to light (its largest). The network was
trained by stage gemm. Other stages run the same training, but rounding drives their weights apart
in the course of it.
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
    figure = pyplot.figure(figsize=sheet.size(12.6, 1.5 + 0.9 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), across + 2, width_ratios=[1.7, *[1] * across, 0.25])
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
        for column, picture in enumerate(group[:across]):
            axes = figure.add_subplot(grid[row, column + 1])
            shown = show(axes, picture, bound if signed else None)
        if signed:
            bar = figure.colorbar(shown, cax=figure.add_subplot(grid[row, across + 1]))
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


def title(found: dict[str, list[np.ndarray]]) -> str:
    """The number and size of the filters in one sentence."""
    for name, group in found.items():
        height, width = group[0].shape
        return f"The {len(group)} filters of {height}x{width} that {name} has learned"
    return "What the network makes of an image"


def subtitle(features: pd.DataFrame, what: str) -> str:
    """Network, how it was trained."""
    first = features.iloc[0]
    return (
        f"{what}; trained by {first['stage']}, batch {first['batch_size']}, "
        f"seed {first['seed']}\nbelow the filters: a test image and its maps, layer by layer"
    )
