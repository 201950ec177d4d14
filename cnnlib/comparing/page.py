"""The page of a comparison: one HTML file that opens without a network."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from cnnlib.comparing import written
from cnnlib.comparing.comparison import Comparison, name_of_stage
from cnnlib.comparing.verdicts import Effect, line_of
from cnnlib.errors import MissingLibrary
from cnnlib.files import write_whole

TEMPLATE = Path(__file__).with_name("page.html.j2")
WIDTH, MARGIN = 220.0, 8.0
"""Pixels of the drawn interval, and of what stays free at both ends."""
LEAST_REACH = 1.1
"""The ratio at the end of the axis, at least: small noise should look small."""


class Bar(NamedTuple):
    """One effect as it is drawn: pixels from the left."""

    band: tuple[float, float]
    """Where ratios lie within the threshold."""
    interval: tuple[float, float] | None
    ratio: float
    word: str


def check_libraries() -> None:
    """Raise MissingLibrary, before anything is read, if the page's library is missing."""
    if find_spec("jinja2") is None:
        raise MissingLibrary("the page of a comparison needs jinja2: pip install 'cnnlib[judge]'")


def write(path: Path, comparison: Comparison) -> None:
    """Write the page, whole or not at all."""
    import jinja2

    reach = reach_of(comparison)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        comparison=comparison,
        summary=written.summary(comparison),
        differences=written.difference_rows(comparison),
        nothing=written.nothing_differs(comparison),
        line_heads=written.LINE_HEADS,
        lines=[(written.line_cells(e), bar(e.effect, reach)) for e in comparison.lines],
        run_heads=written.RUN_HEADS[1:],
        stages=stages(comparison, reach),
        left_out=written.left_out_lines(comparison.left_out),
        notes=written.notes(comparison),
        reach=f"{reach:.3g}",
        width=WIDTH,
    )
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def stages(
    comparison: Comparison, reach: float
) -> list[tuple[str, list[tuple[written.Cells, Bar]]]]:
    """The runs of each stage: its name, and a row for each batch size."""
    found: dict[str, list[tuple[written.Cells, Bar]]] = {}
    for run in comparison.runs:
        row = written.run_cells(run)[1:], bar(run.effect, reach)
        found.setdefault(name_of_stage(line_of(run.key)), []).append(row)
    return list(found.items())


def reach_of(comparison: Comparison) -> float:
    """The ratio at the right end of every axis; at the left end is its inverse."""
    effects = [each.effect for each in comparison.lines]
    effects += [each.effect for each in comparison.runs]
    ratios = [r for e in effects for r in (e.ratio, e.low, e.high) if not math.isnan(r)]
    return max([LEAST_REACH, *(max(ratio, 1 / ratio) for ratio in ratios)])


def bar(effect: Effect, reach: float) -> Bar:
    """Where an effect lies on an axis of logarithms, with 1 in the middle."""

    def place(ratio: float) -> float:
        share = min(max(math.log(ratio) / math.log(reach), -1.0), 1.0)
        return round(WIDTH / 2 + share * (WIDTH / 2 - MARGIN), 1)

    threshold = 0.0 if math.isnan(effect.threshold) else effect.threshold
    band = place(1 / (1 + threshold)), place(1 + threshold)
    interval = None if math.isnan(effect.low) else (place(effect.low), place(effect.high))
    return Bar(band, interval, place(effect.ratio), effect.word)
