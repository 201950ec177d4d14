"""The look of every figure: a colour and mark for each stage, plain axes, the result as title."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from workflow.plotting import ladder, layout
from workflow.plotting.layout import GRID as GRID
from workflow.plotting.layout import INK as INK
from workflow.plotting.layout import QUIET as QUIET


@dataclass(frozen=True)
class Mark:
    color: str
    marker: str


OTHERS = [
    Mark("#56b4e9", "*"),
    Mark("#a6761d", "X"),
    Mark("#e31a8c", "H"),
    Mark("#6b8e00", "*"),
    Mark("#b22222", "X"),
]
"""For stages without a colour or a mark of their own: none is that of a stage of the ladder."""


def mark(stage: str) -> Mark:
    """The colour and mark in the record of `stage`, or ones that its name picks.

    The name also picks them where an earlier stage has the same: a record made from another's by
    `replace` has its colours, but is not to be taken for it.
    """
    found: dict[str, Mark] = {}
    waiting = []
    for record in ladder.known():
        own = Mark(record.color, record.marker)
        if own.color and own.marker and own not in found.values():
            found.setdefault(record.name, own)
        elif record.name not in found:
            waiting.append(record)
    for record in sorted(waiting, key=lambda record: record.name):
        picked = _picked(record.name, found.values())
        colors = {other.color for other in found.values()}
        markers = {other.marker for other in found.values()}
        found[record.name] = Mark(
            picked.color if record.color in {"", *colors} else record.color,
            picked.marker if record.marker in {"", *markers} else record.marker,
        )
    return found.get(stage) or _picked(stage, found.values())


def _picked(name: str, taken: Collection[Mark]) -> Mark:
    """One of OTHERS: the first that is free, counted from a place that the name gives."""
    first = sum(name.encode()) % len(OTHERS)
    in_turn = [*OTHERS[first:], *OTHERS[:first]]
    return next((each for each in in_turn if each not in taken), in_turn[0])


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
    """A label at the right end of a line: at data point (x, y), in the line's colour."""

    x: float
    y: float
    text: str
    color: str


ONE_BY_ONE = 6
"""Panels, at most, that are laid out again before each of them gets its labels."""


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


def _label_ends(axes: Axes, labels: Sequence[Label], gap_points: float = 13.5) -> None:
    """Write the labels of one panel, as it is laid out now."""
    scale = axes.figure.dpi / 72
    labels = sorted(labels, key=lambda label: label.y)
    wanted = [axes.transData.transform((1, label.y))[1] / scale for label in labels]
    bottom, top = (y / scale for y in (axes.bbox.y0, axes.bbox.y1))
    placed = spread(wanted, gap_points, bottom + 4, top - 4)
    x = max(label.x for label in labels)
    for label, at, was in zip(labels, placed, wanted, strict=True):
        # rounded, for the reason that layout.settle gives
        offset = ScaledTranslation(
            9 / 72, layout.rounded((at - was) / 72), axes.figure.dpi_scale_trans
        )
        axes.text(
            x,
            label.y,
            label.text,
            color=label.color,
            fontsize=10,
            weight="bold",
            va="center",
            ha="left",
            transform=axes.transData + offset,
            clip_on=False,
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
