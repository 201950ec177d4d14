"""The layout of a figure: its size, the words above and below, the places of its panels."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedFormatter
from matplotlib.transforms import Bbox

INK, QUIET, GRID = "#222222", "#5c5c5c", "#e4e4e4"
STEP = 2**20
"""Places of panels are rounded to multiples of 1 / STEP; a power of two, so they are exact."""
APART = 4.0
"""The least distance between the numbers of an axis, in points."""
MANY = 3
"""From this many panels on, they are small and arranged in several rows."""
ROW = 15.9
"""Inches that the small panels of a row are wide, with their labels."""
SHORT = 14
"""The most letters of the lines' names with which three small panels fit in a row, not two."""
TITLE_LINE = 0.19
"""Inches of height that a line of a panel's title takes."""
ROOM = {"title": 2, "subtitle": 3, "notes": 3}
"""Lines that a figure has room for; with more of them it becomes higher."""


@dataclass(frozen=True)
class Headline:
    """The words of a figure: title and subtitle above the panels, notes below them."""

    title: str
    subtitle: str
    notes: str


@dataclass(frozen=True)
class Drawing:
    """A figure and its words, which are also written on it unless it is for a sheet."""

    figure: Figure
    headline: Headline


@dataclass(frozen=True)
class Sheet:
    """The space of a figure: a page of its own with its words, or one place of a page.

    A page such as the poster gives each figure a place of `inches` (width, height) and writes the
    headline itself. The type keeps its size in points: the smaller the place, the larger the type
    when it is enlarged.
    """

    inches: tuple[float, float] | None = None

    @property
    def compact(self) -> bool:
        """Whether there is little room: then a figure shows what matters most, and less of it."""
        return self.inches is not None

    def size(self, width: float, height: float) -> tuple[float, float]:
        """Width and height of a figure in inches that would be `width` by `height` by itself."""
        return self.inches or (width, height)


OWN_PAGE = Sheet()
"""Each figure is a file of its own."""


def headline(
    figure: Figure, sheet: Sheet, title: str, subtitle: str, notes: str = "", left_out: str = ""
) -> Headline:
    """Title and subtitle above the panels, left-aligned; notes small below them.

    Lines that are wider than the figure are broken. `left_out` says who is missing from the figure
    and why: further notes. A figure of many lines becomes higher, so that its panels keep their
    size. In a place of a page nothing is written: the page writes what is returned in its own type.
    """
    words = Headline(title, subtitle, "\n".join(filter(None, (notes, left_out))))
    if sheet.compact:
        return words
    width, height = figure.get_size_inches()
    if left_out:
        left_out = wrapped(left_out, width - 0.6, 8.5)
        height += 0.17 * _lines(left_out)
    left = 0.30 / width
    title = wrapped(title, width - 0.6, 15, "bold")
    subtitle = wrapped(subtitle, width - 0.6, 10)
    notes = wrapped(notes, width - 0.6, 8.5)
    height += 0.28 * max(0, _lines(title) - ROOM["title"])
    height += 0.19 * max(0, _lines(subtitle) - ROOM["subtitle"])
    height += 0.17 * max(0, _lines(notes) - ROOM["notes"])
    notes = "\n".join(filter(None, (notes, left_out)))
    figure.set_size_inches(width, height)
    look: dict[str, Any] = {"ha": "left", "linespacing": 1.35}
    top = 0.22
    figure.text(left, 1 - top / height, title, fontsize=15, weight="bold", va="top", **look)
    top += 0.10 + 0.28 * _lines(title)
    figure.text(left, 1 - top / height, subtitle, fontsize=10, color=QUIET, va="top", **look)
    above = top + 0.10 + 0.19 * _lines(subtitle)
    figure.text(left, 0.12 / height, notes, fontsize=8.5, color=QUIET, va="bottom", **look)
    below = 0.18 + 0.17 * _lines(notes) if notes else 0.12
    spacing(
        figure,
        w_pad=0.12,
        rect=(0.12 / width, below / height, 1 - 0.24 / width, 1 - (above + below) / height),
    )
    return words


def spacing(figure: Figure, **sizes: Any) -> None:
    """Set padding and the rectangle of the panels of a figure with a constrained layout."""
    engine = figure.get_layout_engine()
    if not isinstance(engine, ConstrainedLayoutEngine):
        raise TypeError("a figure with words needs layout='constrained'")
    engine.set(**sizes)


def _lines(text: str) -> int:
    return text.count("\n") + 1


def wrapped(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """`text` with its lines broken where they would be wider than `inches`.

    They are broken at spaces; a word that is too long by itself, as names can be, behind an
    underscore, a hyphen or a slash, or anywhere if it has none.
    """
    font = FontProperties(size=size, weight=weight)

    def fits(line: str) -> bool:
        # TextPath measures without a renderer, in points for a size in points; by its corners,
        # since the exact extent of every curve takes seconds. A renderer draws some letters wider.
        return bool(TextPath((0, 0), line, prop=font).vertices[:, 0].max() <= 0.97 * inches * 72)

    lines: list[str] = []
    letters = inches * 72 / (0.6 * size)  # of a line, more or less
    for line in text.split("\n"):
        words = [word for word in line.split(" ") if word]
        lines += [] if words else [""]
        while words:
            count = _most(words, round(letters), fits)
            if count == 1 and len(words[0]) > 1 and not fits(words[0]):
                *full, words[0] = _broken(words[0], fits)
                lines += full
                continue
            lines.append(" ".join(words[:count]))
            words = words[count:]
            letters = len(lines[-1]) if words else letters
    return "\n".join(lines)


def _most(words: Sequence[str], letters: int, fits: Callable[[str], bool]) -> int:
    """How many of the first words fit in a line, and at least one.

    To measure takes milliseconds, so the search begins where a line has about so many letters.
    """
    ends = list(accumulate(len(word) + 1 for word in words))
    count = max(1, bisect_right(ends, letters + 1))
    if fits(" ".join(words[:count])):
        while count < len(words) and fits(" ".join(words[: count + 1])):
            count += 1
        return count
    count -= 1
    while count > 1 and not fits(" ".join(words[:count])):
        count -= 1
    return max(1, count)


def _broken(word: str, fits: Callable[[str], bool]) -> list[str]:
    """The parts of a word, each as long as fits in a line."""
    parts = [""]
    for piece in re.findall(r"[^_/-]*[_/-]+|[^_/-]+", word):
        pieces = [piece] if fits(piece) else list(piece)
        for each in pieces:
            if parts[-1] and not fits(parts[-1] + each):
                parts.append("")
            parts[-1] += each
    return parts


def title(axes: Axes, text: str, inches: float, **look: Any) -> None:
    """A title above a panel that is `inches` wide, left-aligned, in as many lines as it takes."""
    axes.set_title(wrapped(text, inches, 11), fontsize=11, loc="left", **look)


@dataclass(frozen=True)
class SmallPanels:
    """A figure for many panels, the place of each, row by row, and the inches of its title."""

    figure: Figure
    places: list[SubplotSpec]
    across: int
    width: float


def small_panels(
    sheet: Sheet,
    titles: Sequence[str],
    heights: Sequence[float],
    names: Iterable[str] = (),
    left: float = 1.0,
) -> SmallPanels:
    """Room for panels with these titles, with lines of these names and `left` inches before them.

    A row is as high as its highest panel, whose height in inches is without its title.
    """
    across = 3 if max(map(len, names), default=0) <= SHORT else 2
    width = ROW / across - left
    lines = [_lines(wrapped(text, width, 11)) for text in titles]
    each = [high + TITLE_LINE * (count - 1) for high, count in zip(heights, lines, strict=True)]
    rows = [max(each[first : first + across]) for first in range(0, len(each), across)]
    figure = pyplot.figure(figsize=sheet.size(0.6 + ROW, 1.6 + sum(rows)), layout="constrained")
    spacing(figure, h_pad=0.1)
    grid = figure.add_gridspec(len(rows), across, height_ratios=rows)
    places = [grid[divmod(place, across)] for place in range(len(titles))]
    return SmallPanels(figure, places, across, width)


def nothing(sheet: Sheet, title: str, reason: str, left_out: str = "") -> Drawing:
    """A picture that says why there is nothing to see: a missing one would look like a mistake."""
    figure = pyplot.figure(figsize=sheet.size(9.0, 2.4), layout="constrained")
    return Drawing(figure, headline(figure, sheet, title, reason, left_out=left_out))


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
    """Remove every second number below a panel, or more, where they would overlap."""
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


def _crowded(axes: Axes) -> bool:
    shown = [label for label in axes.get_xticklabels() if label.get_visible() and label.get_text()]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
    gap = APART * axes.figure.dpi / 72
    return len(boxes) > 2 and any(later.x0 < box.x1 + gap for box, later in pairwise(boxes))


def rounded(value: float) -> float:
    """`value` rounded to a multiple of 1 / STEP."""
    return round(float(value) * STEP) / STEP
