"""Where things stand in a figure: its size, the words above and below, its panels' places."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedFormatter
from matplotlib.transforms import Bbox

INK, QUIET, GRID = "#222222", "#5c5c5c", "#e4e4e4"
STEP = 2**20
"""What a panel's place is rounded to; a power of two, so that it is exact."""
APART = 4.0
"""Points between the numbers of an axis, at least."""


@dataclass(frozen=True)
class Headline:
    """The words of a figure: title and subtitle above the panels, notes below them."""

    title: str
    subtitle: str
    notes: str


HEADLINES: WeakKeyDictionary[Figure, Headline] = WeakKeyDictionary()
"""Those of every figure that there is."""

_sheet: tuple[float, float] | None = None


@contextmanager
def sheet(width: float, height: float) -> Iterator[None]:
    """Figures made in this context have this size in inches, whatever they ask for, and no words.

    For a page that gives each figure a place and writes its headline itself. The type keeps its
    size in points: the smaller the sheet, the larger the type when it is blown up.
    """
    global _sheet
    before, _sheet = _sheet, (width, height)
    try:
        yield
    finally:
        _sheet = before


def compact() -> bool:
    """Whether figures are made for a sheet: then they show what matters most, and less of it."""
    return _sheet is not None


def fit(figure: Figure) -> None:
    """Called by matplotlib for every new figure: the sheet's size, if there is a sheet."""
    if _sheet is not None:
        figure.set_size_inches(*_sheet)


def headline(
    figure: Figure, title: str, subtitle: str, notes: str = "", left_out: str = ""
) -> None:
    """Title and subtitle above the panels, left-aligned; notes small below them.

    Lines that are wider than the figure are broken at spaces. `left_out` says who is missing from
    the figure and why: further notes, for which the figure grows, so that its panels keep their
    size. On a sheet nothing is written: what stands there says it in its own type (HEADLINES).
    """
    HEADLINES[figure] = Headline(title, subtitle, "\n".join(filter(None, (notes, left_out))))
    if compact():
        return
    width, height = figure.get_size_inches()
    if left_out:
        left_out = _wrapped(figure, left_out, 8.5, "normal")
        height += 0.17 * _lines(left_out)
        figure.set_size_inches(width, height)
    left = 0.30 / width
    title = _wrapped(figure, title, 15, "bold")
    subtitle = _wrapped(figure, subtitle, 10, "normal")
    notes = _wrapped(figure, notes, 8.5, "normal")
    notes = "\n".join(filter(None, (notes, left_out)))
    look = {"ha": "left", "linespacing": 1.35}
    top = 0.22
    figure.text(left, 1 - top / height, title, fontsize=15, weight="bold", va="top", **look)
    top += 0.10 + 0.28 * _lines(title)
    figure.text(left, 1 - top / height, subtitle, fontsize=10, color=QUIET, va="top", **look)
    above = top + 0.10 + 0.19 * _lines(subtitle)
    figure.text(left, 0.12 / height, notes, fontsize=8.5, color=QUIET, va="bottom", **look)
    below = 0.18 + 0.17 * _lines(notes) if notes else 0.12
    figure.get_layout_engine().set(
        w_pad=0.12,
        rect=(0.12 / width, below / height, 1 - 0.24 / width, 1 - (above + below) / height),
    )


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _wrapped(figure: Figure, text: str, size: float, weight: str) -> str:
    """`text` with its lines broken where they would leave the figure."""
    room = (figure.get_size_inches()[0] - 0.6) * 72
    font = FontProperties(size=size, weight=weight)
    lines: list[str] = []
    for line in text.split("\n"):
        current = ""
        for word in line.split(" "):
            longer = f"{current} {word}".strip()
            # TextPath measures without a renderer, in points for a size in points; by its corners,
            # since the exact extent of every curve takes seconds.
            if current and TextPath((0, 0), longer, prop=font).vertices[:, 0].max() > room:
                lines.append(current)
                longer = word
            current = longer
        lines.append(current)
    return "\n".join(lines)


def nothing(title: str, reason: str, left_out: str = "") -> Figure:
    """Said in a picture, since a missing one looks like a mistake."""
    figure = pyplot.figure(figsize=(9.0, 2.4), layout="constrained")
    headline(figure, title, reason, left_out=left_out)
    return figure


def settle(figure: Figure) -> None:
    """Lay `figure` out for good, every panel at a multiple of a millionth of its width and height.

    The solver of the layout walks its equations in the order of their addresses, so that the last
    bits of what it finds differ from one process to the next.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    thin(figure)
    for axes in figure.axes:
        found = axes.get_position(original=True)
        corners = [[rounded(at) for at in corner] for corner in found.get_points()]
        axes.set_position(Bbox(corners), which="original")


def thin(figure: Figure) -> None:
    """Of numbers below a panel that would run into each other every second one goes, or more."""
    for axes in figure.axes:
        while _crowded(axes):
            # counted from the last, the largest of a sweep
            kept = slice((len(axes.get_xticks()) - 1) % 2, None, 2)
            formatter = axes.xaxis.get_major_formatter()
            named = isinstance(formatter, FixedFormatter)
            labels = [label.get_text() for label in axes.get_xticklabels()][kept]
            axes.set_xticks(axes.get_xticks()[kept], labels if named else None)
            if not named:
                axes.xaxis.set_major_formatter(formatter)
            figure.draw_without_rendering()


def _crowded(axes: Axes) -> bool:
    shown = [label for label in axes.get_xticklabels() if label.get_visible() and label.get_text()]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
    gap = APART * axes.figure.dpi / 72
    return len(boxes) > 2 and any(later.x0 < box.x1 + gap for box, later in pairwise(boxes))


def rounded(value: float) -> float:
    """To a multiple of 1 / STEP."""
    return round(float(value) * STEP) / STEP
