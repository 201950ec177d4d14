"""The look of every figure: a colour and mark for each stage, plain axes, the result as title."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Affine2D, ScaledTranslation, Transform

from workflow.plotting import ladder, layout
from workflow.plotting.layout import GRID as GRID
from workflow.plotting.layout import INK as INK
from workflow.plotting.layout import QUIET as QUIET
from workflow.plotting.marks import OTHERS as OTHERS
from workflow.plotting.marks import Dashes as Dashes
from workflow.plotting.marks import Mark as Mark
from workflow.plotting.marks import dashes as dashes
from workflow.plotting.marks import mark as mark


@contextmanager
def _without(*modules: str) -> Iterator[None]:
    """Importing these modules fails as if they were not installed, if it was not done before."""
    hidden: dict[str, None] = {name: None for name in modules if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None: there is no such module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


# Seaborn imports them where they are installed, for statistics that no figure asks it for, and that
# takes nearly as long as all other imports of a figure. Its theme is the same without them.
with _without("scipy.stats", "scipy.cluster"):
    import seaborn


def apply() -> None:
    """Seaborn's theme with our changes; what makes the bytes of a file depend on its data alone."""
    matplotlib.rcdefaults()  # a user's matplotlibrc is for the user's own figures
    seaborn.set_theme(
        context="notebook",
        style="whitegrid",
        font="DejaVu Sans",
        rc={
            "axes.edgecolor": "#9a9a9a",
            "axes.labelcolor": INK,
            "axes.labelsize": 11,
            "axes.linewidth": 0.8,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "text.color": INK,
            "xtick.color": QUIET,
            "ytick.color": QUIET,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "figure.dpi": 100,
            "savefig.dpi": 160,
            "savefig.facecolor": "white",
            "svg.hashsalt": "cnn",
            "svg.fonttype": "path",
            "lines.solid_capstyle": "round",
        },
    )
    matplotlib.rcParams["path.sketch"] = None


def batch_axis(axes: Axes, sizes: Iterable[int]) -> None:
    """Batch sizes on a logarithmic axis, each one written out."""
    sizes = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    span = max(1.0, np.log2(sizes[-1] / sizes[0]))
    axes.set_xlim(sizes[0] * 2 ** (-0.05 * span), sizes[-1] * 2 ** (0.02 * span))
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size (images)")
    axes.grid(False, axis="x")


def times_axis(axes: Axes, values: Iterable[float]) -> None:
    """Speedups on a logarithmic axis: 1x, 10x, 100x, and steps between where there is room."""
    low, high = _limits([*values, 1.0, 2.0], 1.45)
    decades = np.log10(high / low)
    steps = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 3 else (1,)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = [s * 10.0**k for k in range(-9, 10) for s in steps]
    axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}×"))
    axes.yaxis.set_minor_locator(NullLocator())


def quantity_axis(
    axes: Axes,
    which: str,
    values: Iterable[float],
    write: Callable[[float], str],
    steps: Sequence[float] = (1,),
    margin: float = 1.6,
    base: float = 10.0,
) -> None:
    """A logarithmic axis ("x" or "y") around `values`, its ticks written by `write`.

    Ticks are at `steps` times the powers of `base`.
    """
    low, high = _limits(values, margin)
    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log", base=base)
    getattr(axes, f"set_{which}lim")(low, high)
    powers = range(int(np.floor(np.log(low) / np.log(base))), int(np.log(high) / np.log(base)) + 2)
    ticks = [step * base**power for power in powers for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_locator(NullLocator())


SECONDS = (*(10.0**k for k in range(-10, 2)), 60.0, 600.0, 3600.0, 36000.0, 360000.0)


def seconds_axis(
    axes: Axes, values: Iterable[float], steps: Sequence[int] = (1,), which: str = "y"
) -> None:
    """Times on a logarithmic axis, with units that suit: 1 ms, 10 ms, 100 ms, 1 s, 1 min, 1 h.

    `steps` within a decade, for an axis of few decades of short times; `which` is "x" or "y".
    """
    low, high = _limits(values, 1.6)
    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    ticks = [time * step for time in SECONDS for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(NullLocator())


def plain(seconds: float) -> str:
    """A round time as a tick of an axis: 20 ms, 1 s, 10 min."""
    for unit, name in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= unit * 0.999:
            return f"{seconds / unit:.0f} {name}"
    if seconds >= 1e-6 * 0.999:
        return f"{seconds * 1e6:g} µs"
    return f"{seconds * 1e9:g} ns"


def _limits(values: Iterable[float], margin: float) -> tuple[float, float]:
    finite = [v for v in values if np.isfinite(v) and v > 0] or [1.0]
    return min(finite) / margin, max(finite) * margin


@dataclass(frozen=True)
class Label:
    """A label at the right end of a line, at data point (x, y): in ink, beside a piece of the line.

    The piece is in the line's colour, with its dashes and its mark, if it has one.
    """

    x: float
    y: float
    text: str
    color: str
    marker: str = ""
    dashes: Dashes = "-"
    hollow: bool = False


def label(
    x: float, y: float, text: str, stage: str, emulated: bool = False, hollow: bool = False
) -> Label:
    """The label of a stage's line, which is drawn with the stage's mark; peers' are hollow."""
    own, peer = mark(stage), stage in ladder.NAMES_OF_PEERS
    return Label(x, y, text, own.color, own.marker, dashes(stage, emulated), hollow or peer)


ONE_BY_ONE = 6
"""Panels, at most, that are laid out again before each of them gets its labels."""
CHIP = (12.0, 34.0)
"""Where the piece of a line beside its label begins and ends, in points from the panel's edge."""


CHIP_LABEL = "_chip"
"""By which a chip is known from the lines of a panel; no legend shows it."""


def end_labels(figure: Figure, panels: Iterable[tuple[Axes, Sequence[Label]]]) -> None:
    """Write each label right of its line's end, moved up or down just enough not to overlap.

    Call it when the limits of all axes and the figure's size are final. Labels narrow the panels a
    little, so that a few panels are laid out after each other's labels. Of many panels, where that
    would take minutes, all are laid out once.
    """
    waiting = [(axes, labels) for axes, labels in panels if labels]
    for number, (axes, labels) in enumerate(waiting):
        if not number or len(waiting) <= ONE_BY_ONE:
            figure.draw_without_rendering()
        _label_ends(axes, labels)


def _label_ends(axes: Axes, labels: Sequence[Label], gap_points: float = 14.0) -> None:
    """Write the labels of one panel, as it is laid out now."""
    scale = axes.figure.dpi / 72
    labels = sorted(labels, key=lambda label: label.y)
    wanted = [axes.transData.transform((1, label.y))[1] / scale for label in labels]
    bottom, top = (y / scale for y in (axes.bbox.y0, axes.bbox.y1))
    placed = spread(wanted, gap_points, bottom + 4, top - 4)
    x = max(label.x for label in labels)
    for label, at, was in zip(labels, placed, wanted, strict=True):
        # rounded, for the reason that layout.settle gives; in points from the line's end
        place = (
            Affine2D().translate(0, 72 * layout.rounded((at - was) / 72)).scale(1 / 72)
            + axes.figure.dpi_scale_trans
            + ScaledTranslation(x, label.y, axes.transData)  # type: ignore[arg-type]
        )
        chip(axes, CHIP, 0, label, place)
        axes.text(
            CHIP[1] + 5,
            0,
            label.text,
            color=INK,
            fontsize=10,
            va="center",
            ha="left",
            transform=place,
            clip_on=False,
        )


def chip(
    axes: Axes, ends: tuple[float, float], y: float, label: Label, place: Transform | None = None
) -> None:
    """A short piece of a line with its mark, from end to end at `y`, by the transform `place`."""
    axes.plot(
        [ends[0], (ends[0] + ends[1]) / 2, ends[1]],
        [y] * 3,
        color=label.color,
        linestyle=label.dashes,
        linewidth=2,
        marker=label.marker or None,
        markevery=[1],
        markersize=7,
        markeredgecolor=label.color,
        markeredgewidth=1.5,
        markerfacecolor="white" if label.hollow else label.color,
        transform=place or axes.transData,
        label=CHIP_LABEL,
        clip_on=False,
        scalex=False,
        scaley=False,
        zorder=6,
    )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, in order, close to `wanted` (ascending), within [low, high].

    Neighbours that are too close form a block around their mean; blocks that meet are joined.
    """
    blocks: list[list[float]] = []
    for place in wanted:
        blocks.append([place])
        while len(blocks) > 1 and _start(blocks[-1], gap) - _end(blocks[-2], gap) < gap:
            last = blocks.pop()
            blocks[-1] = blocks[-1] + last
    placed = [_start(block, gap) + i * gap for block in blocks for i in range(len(block))]
    for i in range(len(placed)):
        placed[i] = max(placed[i], low + i * gap)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high - (len(placed) - 1 - i) * gap)
    return placed


def _start(block: Sequence[float], gap: float) -> float:
    return float(np.mean(block)) - gap * (len(block) - 1) / 2


def _end(block: Sequence[float], gap: float) -> float:
    return _start(block, gap) + gap * (len(block) - 1)
